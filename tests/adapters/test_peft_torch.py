"""PEFT in PyTorch on the dense model gives the logits of the packed one: both read the other's."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_adapter import random_adapter
from tiny_checkpoint import MODEL, write_checkpoint
from tiny_families import random_tokens, write_model

from gptvq_jax.adapters.peft_files import WEIGHTS, open_adapter, write_adapter
from gptvq_jax.exchange.hf_dense import hf_dense
from gptvq_jax.models.llama import head_logits
from gptvq_jax.models.open import open_source
from gptvq_jax.serve.loglikelihood import last_hidden
from gptvq_jax.serve.params import outer_params
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.storage.checkpoint import PackedCheckpoint

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# PEFT itself uses what transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "checkpoint"
    return str(write_checkpoint(path))


@pytest.fixture(scope="module")
def dense(packed, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "model"
    hf_dense(PackedCheckpoint(packed), path)
    return str(path)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("phi3"), "phi3"))


def torch_model(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def our_logits(served, tokens):
    params, config = served.params(), served.source.config
    return np.asarray(
        head_logits(config, outer_params(params), last_hidden(config, params, tokens))
    )


def same_but_not_as_without(ours, theirs, without):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    assert np.abs(theirs - without).max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_ours(packed, dense, rslora, tmp_path):
    adapter = random_adapter(MODEL, scale=6 / (3**0.5 if rslora else 3))
    write_adapter(tmp_path, MODEL, adapter, alpha=6.0, rslora=rslora)
    tokens = random_tokens(24, MODEL.vocab_size, batch=2)
    model = torch_model(dense)
    without = torch_logits(model, tokens)
    theirs = torch_logits(peft.PeftModel.from_pretrained(model, str(tmp_path)), tokens)
    ours = our_logits(ServedModel(packed, None, "xla", adapter=str(tmp_path)), tokens)
    same_but_not_as_without(ours, theirs, without)


SETTINGS = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"down_proj": 2, r"layers\.1\..*q_proj": 7},
        "alpha_pattern": {"up_proj": 16, r"layers\.0\..*k_proj": 1},
    },
    {"r": 3, "target_modules": r".*\.1\..*(o|gate)_proj", "init_lora_weights": "gaussian"},
]


def from_peft(path, directory, **settings):
    """A random adapter that PEFT made; it and the model without one."""
    model = torch_model(path)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if "lora_B" in name:
                values.normal_(std=0.2)
    adapted.save_pretrained(directory)
    return adapted


@pytest.mark.parametrize("settings", SETTINGS)
def test_ours_reads_pefts(packed, dense, settings, tmp_path):
    adapted = from_peft(dense, tmp_path, **settings)
    tokens = random_tokens(24, MODEL.vocab_size, batch=2)
    ours = our_logits(ServedModel(packed, None, "xla", adapter=str(tmp_path)), tokens)
    with adapted.disable_adapter():
        without = torch_logits(adapted, tokens)
    same_but_not_as_without(ours, torch_logits(adapted, tokens), without)
    # Merged into the export, as PEFT merges it.
    packed = PackedCheckpoint(packed)
    hf_dense(packed, tmp_path / "merged", adapter=open_adapter(tmp_path, packed))
    merged = torch_logits(torch_model(tmp_path / "merged"), tokens)
    np.testing.assert_allclose(merged, torch_logits(adapted, tokens), rtol=0, atol=1e-3)


def test_layers_that_are_stored_as_one_weight(phi3, tmp_path):
    adapted = from_peft(phi3, tmp_path / "peft", r=3, target_modules=["qkv_proj", "gate_up_proj"])
    tokens = random_tokens(20, batch=2)
    without = torch_logits(torch_model(phi3), tokens)
    served = ServedModel(None, phi3, adapter=str(tmp_path / "peft"))
    same_but_not_as_without(our_logits(served, tokens), torch_logits(adapted, tokens), without)
    config = open_source(phi3).config
    adapter = random_adapter(config, ("q_proj", "up_proj"))
    write_adapter(tmp_path / "ours", config, adapter, alpha=6.0)
    again = peft.PeftModel.from_pretrained(torch_model(phi3), str(tmp_path / "ours"))
    served = ServedModel(None, phi3, adapter=str(tmp_path / "ours"))
    same_but_not_as_without(our_logits(served, tokens), torch_logits(again, tokens), without)


def test_names_are_those_of_the_installed_peft(dense, tmp_path):
    from_peft(dense, tmp_path / "peft", r=3, target_modules=["q_proj", "v_proj", "down_proj"])
    write_adapter(tmp_path / "ours", MODEL, random_adapter(MODEL), alpha=6.0)
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "ours"))
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, theirs)
