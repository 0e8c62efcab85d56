"""Streamed perplexity against the whole model at once."""

import jax
import numpy as np
import pytest

from gptvq_jax.models.llama import Decoder
from gptvq_jax.models.open import open_source
from gptvq_jax.run import evaluate, job


@pytest.fixture
def source(model_dir):
    return open_source(str(model_dir))


def whole_model_perplexity(source, windows):
    tree = source.outer()
    for index in range(source.config.num_hidden_layers):
        tree[f"layers_{index}"] = source.block(index)
    logits = Decoder(source.config).apply({"params": tree}, windows)
    log_p = np.asarray(jax.nn.log_softmax(logits[:, :-1]), np.float64)
    picked = np.take_along_axis(log_p, windows[:, 1:, None], axis=-1)
    return np.exp(-picked.mean())


# 300 tokens end in a partly filled chunk of logits; 257 fill exactly one.
@pytest.mark.parametrize("seqlen", [32, pytest.param(257, marks=pytest.mark.slow), 300])
def test_equals_the_whole_model(source, seqlen):
    windows = np.random.default_rng(0).integers(0, 256, (3, seqlen)).astype(np.int32)
    expected = whole_model_perplexity(source, windows)
    assert evaluate.perplexity(source, windows, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_more_text_than_memory_makes_more_passes(source, monkeypatch):
    windows = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.int32)
    whole = evaluate.perplexity(source, windows)
    monkeypatch.setattr(evaluate, "_CACHE_BYTES", 2 * 32 * source.config.hidden_size * 4)
    assert evaluate.passes(source.config, windows) == 2
    calls = []
    assert evaluate.perplexity(source, windows, on_block=lambda: calls.append(0)) == pytest.approx(
        whole, rel=1e-6
    )
    assert len(calls) == 2 * source.config.num_hidden_layers


def test_says_at_which_precision_it_multiplies(model_dir, text_files, capsys):
    text = dict(dataset=text_files[1], num_windows=2, seqlen=32, batch_size=2)
    job.evaluate(None, str(model_dir), **text)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"on 2 x 32 tokens of {text_files[1]}, multiplied in float32")


@pytest.mark.parametrize(
    "loss, expected", [(800.0, np.inf), (np.inf, np.inf), (np.nan, np.nan), (2.0, np.exp(2.0))]
)
def test_losses_beyond_every_number(source, monkeypatch, loss, expected):
    monkeypatch.setattr(evaluate, "token_nll", lambda *_: np.full((1, 31), loss, np.float32))
    windows = np.zeros((1, 32), np.int32)
    np.testing.assert_equal(evaluate.perplexity(source, windows), expected)


def test_windows_beyond_the_model_name_the_flag_of_the_script(model_dir):
    with pytest.raises(ValueError, match=r"beyond the 2048 positions of tiny; set --seqlen=2048"):
        job.evaluate(None, str(model_dir), seqlen=2049)
