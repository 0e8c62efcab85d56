"""GGUF files that we write are the model that was written, read by our reader of llama.cpp's."""

import jax
import numpy as np
import pytest
from tiny_families import write_model

from gptvq_jax.exchange.gguf_file import write_gguf
from gptvq_jax.models.open import open_source

WITHOUT_WINDOW = {"use_sliding_window": False}


@pytest.mark.parametrize(
    "name, changes",
    [
        ("llama", {}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", WITHOUT_WINDOW),
        ("qwen3", {"attention_bias": False}),
        ("olmo2", {}),
        ("granite", {}),
        ("smollm3", {"no_rope_layer_interval": 4, "num_hidden_layers": 4}),
        ("seed_oss", {}),
    ],
)
def test_a_file_is_the_model_that_was_written(tmp_path, name, changes):
    ids = {"bos_token_id": None, "eos_token_id": None}  # without a tokenizer there are none
    source = open_source(str(write_model(tmp_path / "hf", name, **changes, **ids)))
    write_gguf(source, tmp_path / "model.gguf", "float32")
    read = open_source(str(tmp_path / "model.gguf"))
    written, found = source.config.to_hf(), read.config.to_hf()
    if name == "mistral":
        named = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        written = written | named | {k: found[k] for k in ("attention_bias", "mlp_bias")}
        del written["sliding_window"]
    assert found == {**written, **ids, "pad_token_id": None}
    pairs = [(source.outer(), read.outer())]
    pairs += [(source.block(i), read.block(i)) for i in range(read.config.num_hidden_layers)]
    for ours, theirs in pairs:
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_weights_are_rounded_and_norms_are_not(tmp_path):
    source = open_source(str(write_model(tmp_path / "hf", "llama")))
    write_gguf(source, tmp_path / "model.gguf")
    read = open_source(str(tmp_path / "model.gguf"))
    ours, theirs = source.block(1), read.block(1)
    np.testing.assert_array_equal(
        ours["input_layernorm"]["scale"], theirs["input_layernorm"]["scale"]
    )
    kernel = np.asarray(ours["mlp"]["down_proj"]["kernel"])
    rounded = kernel.astype(np.float16).astype(np.float32)
    assert (rounded != kernel).any()
    np.testing.assert_array_equal(theirs["mlp"]["down_proj"]["kernel"], rounded)


@pytest.mark.parametrize(
    "name, message",
    [
        ("mistral", "model_type 'mistral' with a sliding window are not written"),
        ("gemma2", "model_type 'gemma2' with a sliding window are not written"),
        ("mixtral", "model_type 'mixtral' are not written"),
        ("llama linear", "stretched rotary embeddings are not written"),
    ],
)
def test_what_is_not_written_is_refused_before_there_is_a_file(tmp_path, name, message):
    source = open_source(str(write_model(tmp_path / "hf", name)))
    with pytest.raises(NotImplementedError, match=message):
        write_gguf(source, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
