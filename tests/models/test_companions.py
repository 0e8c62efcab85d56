"""The files that transformers reads beside a model: from the source to what is exported."""

import json
import shutil

import numpy as np
import pytest
from models.test_hf_source import random_tensors, write_model
from tiny_checkpoint import tiny_tokenizer
from tiny_gguf import TOKENS, tiny_tensors, write_tiny

from gptvq_jax.exchange.hf_dense import hf_dense
from gptvq_jax.models.companions import read_companions
from gptvq_jax.models.open import open_source
from gptvq_jax.models.tokenizer_files import load_tokenizer, make_portable, save_tokenizer
from gptvq_jax.serve.stop_tokens import stop_tokens
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter

TEXTS = {
    "generation_config.json": json.dumps({"eos_token_id": [1, 7]}),
    "chat_template.jinja": "{% for m in messages %}{{ m.content }} w9{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{{ messages }}",
    "special_tokens_map.json": json.dumps({"eos_token": "w1"}),
    "added_tokens.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "vocab.json": "{}",
    "tokenizer.model": "bytes",
    "tokenizer.model.v3": "bytes",
    "tekken.json": "{}",
    "processor_config.json": "{}",
    "preprocessor_config.json": "{}",
}
OTHER = [
    "README.md",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "x.model.bin",
    "notes/x.json",
]


@pytest.fixture
def model(tmp_path):
    """A directory in Hugging Face's layout with all that may lie in one."""
    directory = tmp_path / "model"
    directory.mkdir()
    write_model(directory, random_tensors())
    for name, text in TEXTS.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    for name in OTHER:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    return directory


def pack(source, directory):
    """A packed checkpoint of any source, made without any solving."""
    writer = CheckpointWriter(directory, "float32")
    writer.write_tokenizer(source.tokenizer, source.companions())
    writer.write_outer(source.outer())
    for index in range(source.config.num_hidden_layers):
        writer.write_block(index, source.block(index))
    writer.finalize({}, source.config, source.name, source.fingerprint)
    return PackedCheckpoint(directory)


def test_every_file_goes_along_and_no_other(model, tmp_path):
    source = open_source(str(model))
    assert stop_tokens(source) == (1, 2, 7)
    packed = pack(source, tmp_path / "packed")
    assert stop_tokens(packed) == (1, 2, 7)
    assert packed.tokenizer.chat_template["default"] == TEXTS["chat_template.jinja"]
    assert packed.tokenizer("w3 w5").input_ids == [3, 5]
    hf_dense(packed, tmp_path / "out")
    out = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert out == {
        *TEXTS,
        "additional_chat_templates",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in (*TEXTS, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes(), name
    assert json.loads((tmp_path / "out/config.json").read_text()) == packed.config.to_hf()


def test_gguf_metadata_become_files(tmp_path):
    template = "{% for m in messages %}{{ m.content }}<user>{% endfor %}"
    extra = [("tokenizer.ggml.eot_token_id", 3), ("tokenizer.chat_template", template)]
    path = write_tiny(tmp_path / "tiny.gguf", tiny_tensors(), extra=extra)
    source = open_source(str(path))
    packed = pack(source, tmp_path / "packed")
    assert stop_tokens(source) == stop_tokens(packed) == (1, 2, 3)  # 2 is the template's
    hf_dense(packed, tmp_path / "out")
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": [1, 3]}
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = open_source(str(tmp_path / "out"))
    assert stop_tokens(again) == (1, 2, 3)
    assert again.tokenizer("".join(TOKENS)).input_ids == source.tokenizer("".join(TOKENS)).input_ids


def test_checkpoints_of_before_are_exported_for_transformers_4_too(model, tmp_path):
    """They hold what transformers 5 writes, and no file of the source."""
    source = open_source(str(model))
    path = pack(source, tmp_path / "packed").directory
    tokenizer = source.tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": ["w5"]})
    shutil.rmtree(path / "tokenizer")
    tokenizer.save_pretrained(path / "tokenizer")
    (path / "tokenizer/config.json").write_text('{"model_type": "bert"}')
    (path / "tokenizer/model.safetensors").write_text("not weights")
    settings = json.loads((path / "tokenizer/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    assert settings["extra_special_tokens"] == ["w5"]

    hf_dense(PackedCheckpoint(path), tmp_path / "out")
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["w5"]
    assert "extra_special_tokens" not in settings
    # Nothing of the tokenizer's directory can replace the model.
    again = open_source(str(tmp_path / "out"))
    assert again.tokenizer.all_special_tokens == tokenizer.all_special_tokens
    np.testing.assert_array_equal(
        again.outer()["lm_head"]["kernel"], source.outer()["lm_head"]["kernel"]
    )


def test_what_a_source_lacks_transformers_writes(tmp_path):
    """A tokenizer.json alone, of which config.json tells the class."""
    tiny_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    own = {**read_companions(tmp_path), "config.json": (tmp_path / "config.json").read_bytes()}
    save_tokenizer(load_tokenizer(tmp_path), tmp_path / "saved", own)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(tmp_path / "saved")("w3 w5").input_ids == [3, 5]


def test_portable_settings_are_left_alone(tmp_path):
    make_portable(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    text = '{"tokenizer_class":   "GPT2Tokenizer", "extra_special_tokens": {"image": "<i>"}}'
    path.write_text(text)
    make_portable(tmp_path)
    assert path.read_text() == text
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds \[\], not a JSON object"):
        make_portable(tmp_path)
