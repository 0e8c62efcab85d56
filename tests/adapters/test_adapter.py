"""An adapter beside packed weights is the one merged into dense ones, in every command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented import REPOSITORY, parsed
from tiny_adapter import random_adapter
from tiny_checkpoint import MODEL, random_block, write_checkpoint

import gptvq_jax
from gptvq_jax.adapters.adapted_source import AdaptedSource
from gptvq_jax.adapters.adapter import Adapter
from gptvq_jax.adapters.peft_files import write_adapter
from gptvq_jax.models.llama import Decoder, head_logits
from gptvq_jax.ops.lora import LoraKernel
from gptvq_jax.run.evaluate_job import evaluate
from gptvq_jax.serve.evaluate_tasks import _cache_file
from gptvq_jax.serve.generate_text import generate_text
from gptvq_jax.serve.loglikelihood import last_hidden
from gptvq_jax.serve.params import dense_params, memory_bytes, outer_params
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study.sample_tensors import TensorFormat

FORMAT = TensorFormat(dim=2, index_bits=4, codebook_bits=8)
COMMANDS = ("generate", "chat", "serve", "evaluate", "evaluate_tasks", "export")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "packed"
    blocks = [random_block(i, MODEL, FORMAT) for i in range(2)]
    return str(write_checkpoint(path, MODEL, "int8", blocks))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    write_adapter(path, MODEL, random_adapter(MODEL), alpha=60.0)
    return str(path)


@pytest.fixture(scope="module")
def exported(checkpoint, adapter, tmp_path_factory):
    """By the script."""
    out = tmp_path_factory.mktemp("exported") / "model"
    command = f"python scripts/export.py --checkpoint={checkpoint} --adapter={adapter}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        with parsed(f"{command} --output={out}", patch) as module:
            module.main([])
    return str(out)


def test_beside_the_weights_is_merged_into_them(checkpoint, adapter):
    served = ServedModel(checkpoint, None, "xla", adapter=adapter)
    params = served.params()
    assert isinstance(params["layers_1"]["mlp"]["down_proj"]["kernel"], LoraKernel)
    source = PackedCheckpoint(checkpoint)
    merged = dense_params(AdaptedSource(source, served.adapter))
    plain = ServedModel(checkpoint, None, "xla").params()
    tokens = np.arange(18).reshape(2, 9)

    def logits(params):
        x = last_hidden(MODEL, params, tokens)
        return np.asarray(head_logits(MODEL, outer_params(params), x))

    np.testing.assert_allclose(logits(params), logits(merged), rtol=1e-4, atol=1e-3)
    assert np.abs(logits(plain) - logits(params)).max() > 0.1
    packed, dense = memory_bytes(params)
    values = sum(layer.a.nbytes + layer.b.nbytes for layer in served.adapter.layers.values())
    assert (packed, dense - values - 6 * 4) == memory_bytes(plain)


def test_from_python(checkpoint, adapter):
    model = gptvq_jax.load(checkpoint, "xla", adapter)
    tokens = np.arange(18).reshape(2, 9)
    merged = Decoder(MODEL).apply({"params": model.dequantize()}, tokens)
    np.testing.assert_allclose(model.logits(tokens), merged, rtol=1e-4, atol=1e-3)
    plain = gptvq_jax.load(checkpoint, "xla")
    assert np.abs(plain.logits(tokens) - merged).max() > 0.1
    text = " ".join(f"w{i * i % 40}" for i in range(64))
    assert abs(model.perplexity(text, seqlen=16) / plain.perplexity(text, seqlen=16) - 1) > 0.01
    with pytest.raises(ValueError, match="adapter must be the path of a directory"):
        gptvq_jax.load(checkpoint, adapter="")


def test_a_leaf_keeps_the_dtype_of_its_inputs():
    layer = random_adapter(MODEL).layers["layers_0/self_attn/q_proj"]
    kernel = layer.beside(jnp.ones((36, 32)))
    x = jax.random.normal(jax.random.key(0), (2, 3, 36))
    y = (x.astype(jnp.bfloat16)) @ kernel
    assert (y.dtype, y.shape, kernel.shape) == (jnp.bfloat16, (2, 3, 32), (36, 32))
    np.testing.assert_allclose(y.astype(jnp.float32), x @ kernel, rtol=0.05, atol=0.2)
    with pytest.raises(ValueError, match="x has 35 columns, the adapter 36"):
        x[..., 1:] @ kernel


@pytest.mark.slow
def test_generated_text_and_perplexity_are_those_of_the_merged_export(
    checkpoint, adapter, exported, tmp_path, capsys
):
    options = {"max_tokens": 8}
    prompt = ["w5 w9 w3 w7"]
    beside = generate_text(
        checkpoint, None, prompt, implementation="xla", adapter=adapter, **options
    )
    assert beside == generate_text(None, exported, prompt, **options)
    assert beside != generate_text(checkpoint, None, prompt, implementation="xla", **options)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 40}" for i in range(200)))
    on = {"dataset": str(text), "seqlen": 16, "num_windows": 8}
    found = evaluate(checkpoint, None, adapter=adapter, **on)
    assert found == pytest.approx(evaluate(None, exported, **on), rel=1e-5)
    assert abs(found / evaluate(checkpoint, None, **on) - 1) > 0.01


def test_answers_of_a_cache_are_of_one_adapter(tmp_path):
    names = ("fingerprint", "implementation", "dense", "dtype", "max_length", "add_bos_token")
    of_model = dict.fromkeys(names)
    files = [
        _cache_file(str(tmp_path), {**of_model, "adapter_fingerprint": digest})
        for digest in (None, "a", "b")
    ]
    assert len(set(files)) == 3


def test_fingerprints_are_of_the_values(adapter):
    one, other = random_adapter(MODEL), random_adapter(MODEL, seed=1)
    same = Adapter(dict(reversed(one.layers.items())), "elsewhere")
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.fingerprint != random_adapter(MODEL, scale=1.0).fingerprint


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_looks_for_the_adapter(name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    more = {
        "generate": "--prompt=w1",
        "export": f"--output={tmp_path}/out",
        "evaluate_tasks": "--tasks=a",
    }
    words = f"--checkpoint={checkpoint} --adapter={tmp_path}/none {more.get(name, '')}"
    with (
        parsed(f"python scripts/{name}.py {words}", monkeypatch) as module,
        pytest.raises((ValueError, FileNotFoundError), match="no adapter directory|not installed"),
    ):
        module.main([])


def test_packed_weights_are_exported_without_one(checkpoint, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = f"--checkpoint={checkpoint} --adapter={adapter} --output={tmp_path}/o --format=hf-aqlm"
    with (
        parsed(f"python scripts/export.py {words}", monkeypatch) as module,
        pytest.raises(ValueError, match="--adapter has no effect on packed weights; add --format"),
    ):
        module.main([])
