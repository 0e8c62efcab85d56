"""What GGUF files say of tokenizers, rotary embeddings and sizes, and what of it is refused."""

import dataclasses
import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import write_gguf
from tiny_families import hf_config, write_model
from tiny_gguf import (
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    TOKENS,
    tiny_tensors,
    write_tiny,
)

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.gguf_metadata import read_metadata
from gptvq_jax.models.gguf_tokenizer import build_tokenizer
from gptvq_jax.models.open import open_source
from gptvq_jax.models.rope import inverse_frequencies
from gptvq_jax.models.rope_scaling import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling
from gptvq_jax.serve.stop_tokens import stop_tokens


def test_small_tokenizer(tmp_path):
    path = tmp_path / "tiny.gguf"
    tokenizer = open_source(str(write_tiny(path, tiny_tensors()))).tokenizer
    assert tokenizer("ab<user>ba1</s>")["input_ids"] == [5, 2, 4, 3, 6, 1]
    assert tokenizer.all_special_ids == [0, 1]
    extra = [("tokenizer.ggml.add_bos_token", True), ("tokenizer.ggml.add_eos_token", True)]
    tokenizer = open_source(str(write_tiny(path, tiny_tensors(), extra=extra))).tokenizer
    assert tokenizer("ab")["input_ids"] == [0, 5, 1]
    # Llama 3's vocabulary starts with BOS unless the file says otherwise.
    tokenizer = open_source(str(write_tiny(path, tiny_tensors(), split="llama-bpe"))).tokenizer
    assert tokenizer("ab")["input_ids"] == [0, 5]


def test_unsupported_tokenizers(tmp_path):
    path = tmp_path / "tiny.gguf"
    source = open_source(str(write_tiny(path, tiny_tensors(), split="tekken")))
    with pytest.raises(NotImplementedError, match=r"tokenizer\.ggml\.pre = 'tekken'"):
        source.tokenizer  # noqa: B018
    source = open_source(str(write_tiny(path, tiny_tensors(), vocab="bert")))
    with pytest.raises(NotImplementedError, match=r"tokenizer\.ggml\.model = 'bert'"):
        source.tokenizer  # noqa: B018
    with pytest.raises(ValueError, match=r"tiny\.gguf has no usable tokenizer: .*ggml\.tokens"):
        build_tokenizer({"tokenizer.ggml.model": "gpt2"}.get, path)


METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 4, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 1,
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("merges", ["a b", "a"]),
        ("merges", ["a b a"]),
        ("merges", ["a  b"]),
        ("merges", ["a z"]),
        ("merges", ["b a"]),  # of which the result is no token
        ("merges", [["a", "b"]]),
        ("merges", [1]),
        ("merges", "a b"),
        ("merges", None),
        ("tokens", [*TOKENS[:-1], 7]),
        ("tokens", []),
        ("tokens", 3),
        ("token_type", [3, 3]),
        ("token_type", ["3"] * 7),
        ("eos_token_id", -1),
        ("eos_token_id", 7),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1]),
        ("add_bos_token", "false"),
    ],
)
def test_damaged_tokenizers(name, value):
    build_tokenizer(METADATA.get, Path("tiny.gguf"))
    name = f"tokenizer.ggml.{name}"
    with pytest.raises(ValueError, match=r"tiny\.gguf has no usable tokenizer: ") as caught:
        build_tokenizer((METADATA | {name: value}).get, Path("tiny.gguf"))
    field = "the id 7 of eos_token" if value == 7 else name
    assert field in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template must be a string"):
        build_tokenizer((METADATA | {"tokenizer.chat_template": 1}).get, Path("tiny.gguf"))


@pytest.mark.parametrize(
    "extra, expected",
    [
        ({"scale_linear": 4.0}, LinearRopeScaling(4.0)),
        ({"scaling.factor": 4.0}, LinearRopeScaling(4.0)),
        ({"scaling.factor": 0.5, "scaling.type": "linear"}, LinearRopeScaling(0.5)),
        ({"scaling.type": "yarn", "scaling.factor": 1.0}, None),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 16,
                "scaling.yarn_beta_fast": 8.0,
            },
            YarnRopeScaling(4.0, 16, 0.1 * np.log(4) + 1, beta_fast=8.0),
        ),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_ext_factor": 0.5},
            "scaling.yarn_ext_factor = 0.5",
        ),
        ({"scaling.factor": -1.0}, "scaling.factor must be a number from 0"),
        ({"scaling.type": "longrope"}, "scaling.type = 'longrope'"),
        ({"scaling.attn_factor": 1.2, "scaling.type": "none"}, "scaling.attn_factor = 1.2"),
        ({"scaling.factor": 1.0, "scale_linear": 1.0, "scaling.attn_factor": 1.0}, None),
        ({"scaling.factor": 0.0}, None),
        ({"scaling.factor": 4.0, "scaling.type": "none"}, None),
        ({"scaling.original_context_length": 32, "scaling.finetuned": True}, None),
    ],
)
def test_stretched_rotary_embeddings(tmp_path, extra, expected):
    path = tmp_path / "tiny.gguf"
    written = [(f"llama.rope.{name}", value) for name, value in extra.items()]
    write_tiny(path, tiny_tensors(), extra=written)
    if not isinstance(expected, str):
        assert open_source(str(path)).config.rope_scaling == expected
    else:
        message = re.escape(f"tiny.gguf: llama.rope.{expected}")
        with pytest.raises((NotImplementedError, ValueError), match=message):
            open_source(str(path))


def test_wavelengths_of_llama_3(tmp_path):
    """Stored as factors, of which the parameters are found again."""
    scaling = Llama3RopeScaling(32.0, 1.0, 4.0, 8192)
    shape = ModelConfig.from_hf(hf_config("llama", head_dim=64, rope_theta=5e5))
    plain, stretched = (
        inverse_frequencies(dataclasses.replace(shape, rope_scaling=one)) for one in (None, scaling)
    )
    assert len(set(np.round(plain / stretched))) > 2
    directory = write_model(tmp_path, "llama", head_dim=64, rope_theta=5e5)
    path = write_gguf(tmp_path / "tiny.gguf", directory, "llama")
    rope = {"rope_freqs.weight": (plain / stretched).astype(np.float32)}
    assert open_source(str(path)).config.rope_scaling is None
    path = write_gguf(tmp_path / "tiny.gguf", directory, "llama", rope)
    assert open_source(str(path)).config.rope_scaling == scaling
    path = write_gguf(
        tmp_path / "tiny.gguf", directory, "llama", {k: v**2 for k, v in rope.items()}
    )
    with pytest.raises(NotImplementedError, match=r"rope_freqs\.weight\) otherwise than Llama 3"):
        open_source(str(path))


@pytest.mark.parametrize(
    "key",
    [f"llama.{name}" for name in ("embedding_length", "block_count", "context_length")]
    + ["llama.attention.head_count", "llama.attention.key_length", "llama.rope.freq_base"]
    + ["llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.bos_token_id"]
    + ["tokenizer.ggml.eot_token_id", "general.architecture"],
)
def test_metadata_of_another_type(key):
    fields = {
        "general.architecture": "llama",
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 64,
    }
    for value in (-1, True, "4", [4], [], float("nan"), float("inf"), 10**38):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            read_metadata((fields | {key: value}).get, {})
        assert key in str(caught.value) or key == "general.architecture"


def test_metadata_are_what_the_library_reads(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", tiny_tensors(), extra=[("llama.flag", True)])
    source, library = open_source(str(path)), gguf.GGUFReader(path)
    kinds = {field.types[0] for field in library.fields.values() if field.types}
    assert gguf.GGUFValueType.ARRAY in kinds
    for name, field in library.fields.items():
        assert source._field(name) == field.contents(), name


def test_a_count_beyond_the_end_of_the_file_ends_at_once(tmp_path):
    """The library would fill such an array with nothing, for years."""
    path = write_tiny(tmp_path / "tiny.gguf", tiny_tensors())
    whole = path.read_bytes()
    key = b"tokenizer.ggml.token_type"
    count = whole.index(key) + len(key) + 8
    path.write_bytes(whole[:count] + (2**60).to_bytes(8, "little") + whole[count + 8 :])
    with pytest.raises(ValueError, match=r"tiny\.gguf is not a complete GGUF file"):
        open_source(str(path))


def test_ends_of_turn_and_of_message_end_a_text(tmp_path):
    ids = [("eot", 2), ("eom", 4), ("padding", 2**32 - 1)]  # -1: none
    extra = [(f"tokenizer.ggml.{name}_token_id", index) for name, index in ids]
    source = open_source(str(write_tiny(tmp_path / "tiny.gguf", tiny_tensors(), extra=extra)))
    assert stop_tokens(source) == (1, 2, 4) and source.tokenizer.pad_token is None
    written = json.loads(source.companions()["generation_config.json"])
    assert written == {"bos_token_id": 0, "eos_token_id": [1, 2, 4]}
