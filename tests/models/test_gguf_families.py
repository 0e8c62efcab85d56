"""Every family from a GGUF file is the same model as from safetensors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from gguf_files import ARCHITECTURES, write_gguf
from tiny_families import CONFIGS, write_model

from gptvq_jax.models.families import FAMILIES
from gptvq_jax.models.families.base import GGUFForm, nothing
from gptvq_jax.models.open import open_source

# What llama.cpp knows without a field in the file, or has no field for.
_GEMMA = {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}
CHANGES = {
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"attention_bias": False},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 4},
    "gemma2": _GEMMA,
    "gemma3_text": {
        **_GEMMA,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "num_hidden_layers": 6,
    },
}
NAMES = [name for name in CONFIGS if CONFIGS[name]["model_type"] != "mistral"]
UNWRITTEN = ("llama dynamic", "llama yarn mscale")  # of which llama.cpp has no such form


def test_every_family_that_llama_cpp_writes_is_here():
    there = {name for name, family in FAMILIES.items() if family.gguf}
    assert {CONFIGS[name]["model_type"] for name in NAMES} >= there
    forms = [family.gguf for family in FAMILIES.values() if family.gguf]
    assert len({(form.architecture, form.window) for form in forms}) == len(forms)
    assert {form.architecture for form in forms} >= {
        *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "smollm3")
    }


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in UNWRITTEN and FAMILIES[CONFIGS[n]["model_type"]].gguf]
)
def test_same_model_as_from_safetensors(tmp_path, name):
    """Equal configs and weights, of which equal logits follow."""
    directory = write_model(tmp_path / "hf", name, **CHANGES.get(name, {}))
    expected = open_source(str(directory))
    path = write_gguf(tmp_path / "tiny.gguf", directory, CONFIGS[name]["model_type"])
    source = open_source(str(path))
    written, read = expected.config.to_hf(), source.config.to_hf()
    assert read == {**written, "pad_token_id": None}
    # Norms of 1 + scale are stored with their 1, which rounds the scale.
    atol = 3e-7 if source.config.family.norm_offset else 0
    same = [(expected.outer(), source.outer())]
    same += [(expected.block(i), source.block(i)) for i in range(source.config.num_hidden_layers)]
    for ours, theirs in same:
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=atol)


def test_of_two_families_with_one_architecture_a_window_tells_which(tmp_path, monkeypatch):
    windowed = dataclasses.replace(
        FAMILIES["qwen3"],
        model_type="windowed",
        read=nothing,
        handles=("sliding_window",),
        gguf=GGUFForm("qwen3", window=True),
    )
    monkeypatch.setitem(FAMILIES, "windowed", windowed)
    directory = write_model(tmp_path, "qwen3", attention_bias=False)
    monkeypatch.setitem(ARCHITECTURES, "phi3", "qwen3")  # which is written with a window
    config = json.loads((directory / "config.json").read_text()) | {"sliding_window": 7}
    (directory / "config.json").write_text(json.dumps(config))
    found = {}
    for name in ("qwen3", "phi3"):
        source = open_source(str(write_gguf(tmp_path / f"{name}.gguf", directory, name)))
        found[source.config.model_type] = source.config.sliding_window
    assert found == {"qwen3": None, "windowed": 7}


def test_what_a_file_of_a_family_cannot_say_is_refused(tmp_path):
    directory = write_model(tmp_path / "hf", "olmo2")
    path = tmp_path / "tiny.gguf"
    extra = {"blk.0.ffn_gate.bias": np.zeros(80, np.float32)}
    write_gguf(path, directory, "olmo2", extra)
    with pytest.raises(NotImplementedError, match=r"holds 1 tensor.*blk\.0\.ffn_gate\.bias"):
        open_source(str(path))
