"""Directories in Hugging Face's layout, written here: reading them, and what may be wrong."""

import importlib.util
import json

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from gptvq_jax.data.windows import calibration_windows, evaluation_windows
from gptvq_jax.models import hf_directory, tokenizer_files
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.open import open_source
from gptvq_jax.models.shapes import block_shapes, outer_shapes
from gptvq_jax.serve.generate_text import generate_text
from gptvq_jax.serve.stop_tokens import stop_tokens

CONFIG = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
UP = "model.layers.1.mlp.up_proj.weight"


def random_tensors(dtype=np.float32, seed=0):
    """Returns {name: array as stored} of every tensor of CONFIG."""
    config = ModelConfig.from_hf(CONFIG)
    shapes = dict(outer_shapes(config))
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{k}": shape for k, shape in block_shapes(config).items()}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_model(directory, tensors, shards=1, vocab_size=11, config=CONFIG):
    """Writes a model directory; with several shards the tensors are dealt out in turn."""
    (directory / "config.json").write_text(json.dumps(config))
    vocab = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        home = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
        for name in names:
            save_file({k: v for k, v in tensors.items() if home[k] == name}, directory / name)
        index = {"metadata": {}, "weight_map": home}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(directory)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_layout(tmp_path, shards, dtype):
    tensors = random_tensors(dtype)
    source = open_source(write_model(tmp_path, tensors, shards))
    assert source.name == tmp_path.name
    assert source.config.hidden_size == 12
    outer, block = source.outer(), source.block(2)

    def stored(name):
        return tensors[name].astype(np.float32)

    embedding = outer["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(embedding, stored("model.embed_tokens.weight"))
    np.testing.assert_array_equal(outer["norm"]["scale"], stored("model.norm.weight"))
    np.testing.assert_array_equal(outer["lm_head"]["kernel"].T, stored("lm_head.weight"))
    for module, name in (
        *[("self_attn", f"{letter}_proj") for letter in "qkvo"],
        *[("mlp", f"{part}_proj") for part in ("gate", "up", "down")],
    ):
        kernel = block[module][name]["kernel"]
        np.testing.assert_array_equal(kernel.T, stored(f"model.layers.2.{module}.{name}.weight"))
    for name in ("input_layernorm", "post_attention_layernorm"):
        expected = stored(f"model.layers.2.{name}.weight")
        np.testing.assert_array_equal(block[name]["scale"], expected)
    assert len(jax.tree.leaves(block)) == 9
    assert {leaf.dtype for leaf in jax.tree.leaves((outer, block))} == {np.dtype(np.float32)}


def test_tokenizer(tmp_path):
    source = open_source(write_model(tmp_path, random_tensors()))
    assert source.tokenizer("w3 w10 other")["input_ids"] == [3, 10, 0]


def test_only_a_text_with_an_id_beyond_the_embedding_is_refused(tmp_path):
    path = write_model(tmp_path, random_tensors(), vocab_size=12)
    source = open_source(path)
    assert source.tokenizer("w3 w10")["input_ids"] == [3, 10]
    message = r"holds the token 'w11': its token id 11 is outside .* vocabulary of 11"
    for windows in (calibration_windows, evaluation_windows):
        options = {"num_windows": 1, "seed": 0} if windows is calibration_windows else {}
        windows(source.tokenizer, ["w3 w10"], seqlen=2, vocab_size=11, **options)
        with pytest.raises(ValueError, match="the text " + message):
            windows(source.tokenizer, ["w3 w11"], seqlen=2, vocab_size=11, **options)
    with pytest.raises(ValueError, match="prompt 1 " + message):
        generate_text(None, path, ["w3", "w11 w2"])


def test_tokenizer_missing(tmp_path):
    source = open_source(write_model(tmp_path, random_tensors()))
    (tmp_path / "tokenizer.json").unlink()
    # What transformers would make of the name of a class alone knows no word.
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match="has no usable tokenizer: there is neither a tokenizer"):
        source.tokenizer  # noqa: B018


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda content: content.pop("model"), "Model missing"),
        (lambda content: content.update(model={"type": "New"}), "did not match any variant"),
        (lambda content: content.update(pre_tokenizer={"type": "New"}), "did not match any"),
        (lambda content: content.update(model=3), "no usable tokenizer"),
    ],
)
def test_tokenizer_of_a_newer_library(tmp_path, change, reason):
    source = open_source(write_model(tmp_path, random_tensors()))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"has no usable tokenizer: .*{reason}|{reason}") as caught:
        source.tokenizer  # noqa: B018
    assert "--upgrade" in str(caught.value)


def test_a_sentencepiece_model_asks_for_its_package(tmp_path, monkeypatch):
    source = open_source(write_model(tmp_path, random_tensors()))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        tokenizer_files.importlib.util,
        "find_spec",
        lambda name, *args: None if name == "sentencepiece" else found(name, *args),
    )
    with pytest.raises(ValueError, match="no usable tokenizer: .*pip install sentencepiece"):
        source.tokenizer  # noqa: B018


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_stored_head_counts_more_than_a_tied_config(tmp_path, monkeypatch, dtype, shards):
    monkeypatch.setattr(hf_directory, "_CHUNK_VALUES", 24)  # two rows of 12 at a time
    tensors = random_tensors(dtype)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    path = write_model(tmp_path, tensors, shards, config=CONFIG | TIED)
    source = open_source(path)
    assert source.config.tie_word_embeddings
    assert set(source.outer()) == {"embed_tokens", "norm"}

    head[-1, -1] += 1  # the last value of the last slice
    source = open_source(write_model(tmp_path, tensors, shards, config=CONFIG | TIED))
    assert not source.config.tie_word_embeddings
    assert source.config.to_hf()["tie_word_embeddings"] is False
    kernel = source.outer()["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel.T, head.astype(np.float32))

    tensors["lm_head.weight"] = head[:5]
    source = open_source(write_model(tmp_path, tensors, shards, config=CONFIG | TIED))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(5, 12\)"):
        source.outer()


def test_a_tied_matrix_may_be_stored_under_either_name(tmp_path):
    tensors = random_tensors()
    del tensors["model.embed_tokens.weight"]
    outer = open_source(write_model(tmp_path, tensors, config=CONFIG | TIED)).outer()
    assert set(outer) == {"embed_tokens", "norm"}
    np.testing.assert_array_equal(outer["embed_tokens"]["embedding"], tensors["lm_head.weight"])
    with pytest.raises(ValueError, match=r"lacks 1 tensor.*embed_tokens\.weight"):
        open_source(write_model(tmp_path, tensors))


def test_a_tied_head_need_not_be_stored(tmp_path):
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    open_source(write_model(tmp_path, tensors, config=CONFIG | TIED)).outer()
    with pytest.raises(ValueError, match=r"lacks 1 tensor.*lm_head\.weight"):
        open_source(write_model(tmp_path, tensors))


def test_fingerprint_depends_on_weights_only(tmp_path):
    directories = [tmp_path / name for name in "abc"]
    for directory, seed in zip(directories, (0, 0, 1), strict=True):
        directory.mkdir()
        write_model(directory, random_tensors(seed=seed), shards=2)
    first, same, other = (open_source(str(directory)).fingerprint for directory in directories)
    assert first == same != other


def test_missing_shard(tmp_path):
    path = write_model(tmp_path, random_tensors(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors"):
        open_source(path)


@pytest.mark.parametrize("length", [0, 5, 300, -10])
def test_truncated_shard(tmp_path, length):
    path = write_model(tmp_path, random_tensors(), shards=2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is not a complete"):
        open_source(path)


def test_missing_tensor(tmp_path):
    tensors = random_tensors()
    del tensors[UP]
    with pytest.raises(ValueError, match=f"lacks 1 tensor.* {UP}"):
        open_source(write_model(tmp_path, tensors))


def test_tensor_absent_from_its_shard(tmp_path):
    path = write_model(tmp_path, random_tensors(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    home = content["weight_map"]
    home[UP] = next(name for name in home.values() if name != home[UP])
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"lacks tensor {UP}, which model.safetensors.index"):
        open_source(path)


@pytest.mark.parametrize(
    "listed",
    [
        {"a\nb": "model.safetensors.index.json"},
        {"a": "b\nc.safetensors"},
        {"a": "\ud800"},
        {"a": ""},
    ],
)
def test_an_index_of_names_in_several_lines(tmp_path, listed):
    path = write_model(tmp_path, random_tensors(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ValueError) as raised:
        open_source(path)
    assert len(str(raised.value).splitlines()) == 1 and str(path) in str(raised.value)


def test_tensors_whose_names_have_several_lines(tmp_path):
    path = write_model(tmp_path, random_tensors() | {"a\nb": np.zeros(2, np.float32)})
    with pytest.raises(NotImplementedError) as raised:
        open_source(path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_head_that_the_index_does_not_list_counts(tmp_path):
    tensors = random_tensors()
    path = write_model(tmp_path, tensors, shards=2, config=CONFIG | TIED)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    kernel = open_source(path).outer()["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel.T, tensors["lm_head.weight"])


def test_token_ids_that_are_none(tmp_path):
    none = {"bos_token_id": -1, "eos_token_id": -1}
    path = write_model(tmp_path, random_tensors(), config=CONFIG | none)
    source = open_source(path)
    assert (source.config.bos_token_id, source.config.eos_token_id) == (None, None)
    assert stop_tokens(source) == ()
    assert ModelConfig.from_hf(CONFIG | {"eos_token_id": [3, -1]}).eos_token_id == (3,)
    for ids, expected in ((-1, ()), ([5, -1], (5,)), ([], ()), (None, ())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert stop_tokens(open_source(path)) == expected


def test_unknown_tensor(tmp_path):
    extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(12, np.float32)}
    with pytest.raises(NotImplementedError, match=r"q_proj\.bias"):
        open_source(write_model(tmp_path, random_tensors() | extra))


def test_a_shard_cut_short_after_it_was_opened(tmp_path):
    source = open_source(write_model(tmp_path, random_tensors()))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors has changed since it was opened"):
        source.block(0)
    with pytest.raises(ValueError, match=r"model\.safetensors has changed since it was opened"):
        source.outer()


def test_float64_is_rounded(tmp_path):
    tensors = random_tensors(np.float64)
    source = open_source(write_model(tmp_path, tensors))
    kernel = source.block(1)["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors[UP].astype(np.float32).T)
    tensors[UP][0, 3] = 1e300
    source = open_source(write_model(tmp_path, tensors))
    with pytest.raises(ValueError, match=f"tensor {UP} contains NaN or Inf"):
        source.block(1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, value):
    tensors = random_tensors(ml_dtypes.bfloat16)
    tensors[UP][0, 3] = value
    source = open_source(write_model(tmp_path, tensors))
    source.block(0)
    with pytest.raises(ValueError, match=f"model.safetensors: tensor {UP} contains NaN or Inf"):
        source.block(1)


def test_wrong_shape_and_dtype(tmp_path):
    tensors = random_tensors()
    source = open_source(write_model(tmp_path, tensors | {UP: tensors[UP].T.copy()}))
    with pytest.raises(ValueError, match=rf"{UP} has shape \(12, 20\), the config says \(20, 12\)"):
        source.block(1)
    source = open_source(write_model(tmp_path, tensors | {UP: tensors[UP].astype(np.int8)}))
    with pytest.raises(NotImplementedError, match=f"{UP} is stored as I8"):
        source.block(1)


def test_pickles_only(tmp_path):
    path = write_model(tmp_path, random_tensors())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickles .*convert them.*save_pretrained"):
        open_source(path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        open_source(path)


def test_bad_config(tmp_path):
    path = write_model(tmp_path, random_tensors(), config=CONFIG | {"model_type": "bert"})
    with pytest.raises(NotImplementedError, match=r"config\.json: model_type='bert'"):
        open_source(path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        open_source(path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_source(path)


def test_hub_name(tmp_path, monkeypatch):
    path, asked = write_model(tmp_path, random_tensors()), {}

    def download(name, allow_patterns, ignore_patterns):
        asked.update(name=name, allow=allow_patterns)
        return path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("maker/tiny-llama")
    assert source.name == asked["name"] == "maker/tiny-llama"
    assert "*.safetensors" in asked["allow"] and "*.bin" not in asked["allow"]


def test_hub_without_network(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="pass a local directory") as caught:
        open_source("maker/tiny-llama")
    assert "\n" not in str(caught.value) and "maker/tiny-llama" in str(caught.value)
