"""Two models on one text: against both whole models at once, and what a run makes of it."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from steps import Steps
from tiny_run import NUM_BLOCKS, byte_tokenizer

from gptvq_jax.core.divergence import FIGURES
from gptvq_jax.models.llama import Decoder
from gptvq_jax.models.open import open_source
from gptvq_jax.run import compare, evaluate, evaluate_job, job
from gptvq_jax.run.evaluate import evaluated
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study.random_model import write_random_llama


def log_probabilities(source, windows):
    """Of the whole model, in float64 from its logits on."""
    tree = source.outer()
    for index in range(source.config.num_hidden_layers):
        tree[f"layers_{index}"] = source.block(index)
    logits = jax.jit(Decoder(source.config).apply)({"params": tree}, windows)[:, :-1]
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def expected_figures(source, reference, windows):
    log_q, log_p = (log_probabilities(each, windows) for each in (source, reference))
    targets = windows[:, 1:, None]
    nll = [-np.take_along_axis(x, targets, axis=-1)[..., 0] for x in (log_q, log_p)]
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return np.stack([*nll, kl, log_p.argmax(-1) == log_q.argmax(-1)], axis=-1)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of the same vocabulary, with one block less and other sizes."""
    path = tmp_path_factory.mktemp("other") / "other"
    write_random_llama(path, byte_tokenizer(), NUM_BLOCKS - 1, hidden=32, head_dim=16, seed=1)
    return path


# 50 tokens end in a partly filled chunk of logits; 65 fill two.
@pytest.mark.parametrize(
    "seqlen, batch_size", [(50, 2), pytest.param(65, 5, marks=pytest.mark.slow)]
)
def test_figures_are_those_of_the_whole_models(model_dir, other, seqlen, batch_size):
    source, reference = open_source(str(model_dir)), open_source(str(other))
    windows = np.random.default_rng(0).integers(0, 256, (5, seqlen)).astype(np.int32)
    found, steps = np.empty((5, seqlen - 1, len(FIGURES)), np.float32), Steps()
    with (
        evaluated(source, windows, batch_size) as of_model,
        evaluated(reference, windows, batch_size) as of_reference,
    ):
        compare.write_figures(of_model, of_reference, found, steps)
    assert steps.advanced == 5
    expected = expected_figures(source, reference, windows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[..., 3], expected[..., 3])
    assert found[..., 2].min() > 0


def test_the_comparison_of_figures_by_hand():
    log = np.log
    figures = np.zeros((2, 3, 4), np.float32)
    figures[..., 0] = [[log(2), log(2), log(2)], [log(8), log(8), log(8)]]
    figures[..., 1] = [[log(2), log(2), log(2)], [log(4), log(4), log(4)]]
    figures[..., 2] = [[0, 1, 2], [3, 4, 10]]
    figures[..., 3] = [[1, 1, 1], [1, 0, 0]]
    found = compare.comparison(figures)
    values = {name: figure["value"] for name, figure in found.items()}
    assert values == pytest.approx(
        {
            "perplexity": 4,
            "perplexity_float": 2**1.5,
            "log_perplexity_ratio": log(2) / 2,
            "kl_mean": 20 / 6,
            "kl_median": 2.5,
            "kl_99": 9.7,
            "kl_max": 10,
            "same_top1": 4 / 6,
        },
        rel=1e-6,
    )
    errors = {name: figure["standard_error"] for name, figure in found.items()}
    # Of two means a and b, the deviation is |a - b| / sqrt(2), and the error |a - b| / 2.
    assert errors["perplexity"] == pytest.approx(4 * log(4) / 2)
    assert errors["log_perplexity_ratio"] == pytest.approx(log(2) / 2)
    assert errors["kl_mean"] == pytest.approx((17 / 3 - 1) / 2)
    assert errors["same_top1"] == pytest.approx(1 / 3)
    assert errors["kl_max"] is None and errors["kl_median"] > 0
    one = compare.comparison(figures[:1])
    assert {figure["standard_error"] for figure in one.values()} == {None}


def test_losses_beyond_every_number_are_told_as_they_are():
    figures = np.zeros((2, 3, 4), np.float32)
    figures[0, 0] = np.nan
    figures[..., 1] = 800
    found = compare.comparison(figures)
    assert np.isnan(found["perplexity"]["value"]) and np.isnan(found["kl_mean"]["standard_error"])
    assert found["perplexity_float"]["value"] == np.inf


# --- a run


@pytest.fixture
def config(tiny_config, monkeypatch):
    """One block is quantized, nothing solved, and no picture drawn, which takes longer."""
    monkeypatch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
    tiny_config.method, tiny_config.num_blocks = "rtn", 1
    return tiny_config


def test_a_run_compares_its_models(config, tmp_path, capsys):
    summary = job.quantize(config, str(tmp_path / "run"))
    printed = capsys.readouterr().out
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert row["comparison"] == summary["comparison"] and row["protocol"] == summary["protocol"]
    assert summary["protocol"] == {
        "dataset": config.evaluation.dataset,
        "split": "whole file",
        "joiner": None,
        "windows": 4,
        "context": 32,
        "tokens": 4 * 31,
        "bos": "none",
    }
    figures = np.load(tmp_path / "run/evaluation/figures.npy")
    source, packed = open_source(config.model), PackedCheckpoint(tmp_path / "run/checkpoint")
    text = Path(config.evaluation.dataset).read_text()
    tokens = np.int32(source.tokenizer(text[: 4 * 32])["input_ids"]).reshape(4, 32)
    expected = expected_figures(packed, source, tokens)
    np.testing.assert_allclose(figures, expected, rtol=1e-4, atol=1e-5)
    assert summary["comparison"] == compare.comparison(figures)
    compared = summary["comparison"]
    assert compared["perplexity"]["value"] == summary["perplexity_quantized"]
    assert compared["perplexity_float"]["value"] == summary["perplexity_float"]
    assert 0 < compared["kl_median"]["value"] < compared["kl_99"]["value"]
    kl = compared["kl_mean"]
    percent = {name: 100 * part for name, part in compared["same_top1"].items()}
    assert f"KL divergence  mean {kl['value']:.4g} ± {kl['standard_error']:.2g}, me" in printed
    assert "nats a token, KL(float || quantized)\n" in printed
    shown = f"{percent['value']:.2f} ± {percent['standard_error']:.2g} %"
    assert f"same top-1  {shown} of tokens" in printed
    assert "protocol  " in printed and "4 windows x 32 tokens, 124 predicted; BOS: none" in printed
    # What the two models' outputs took is free again.
    left = [path.name for path in (tmp_path / "run/evaluation").iterdir()]
    assert left == ["figures.npy"]

    again = evaluate_job.compare(str(tmp_path / "run/checkpoint"), None, config.model)
    for name, figure in compared.items():
        values = [part for part in figure.values() if part is not None]
        assert [part for part in again[name].values() if part is not None] == pytest.approx(
            values, rel=1e-4
        ), name


def walked(monkeypatch):
    """Names of the models that go through `walk` with blocks to be done."""
    seen = []
    visit = evaluate.Evaluation.visit

    def visiting(evaluation, index, block):
        seen.append(type(evaluation.source).__name__)
        visit(evaluation, index, block)

    monkeypatch.setattr(evaluate.Evaluation, "visit", visiting)
    return seen


def test_runs_share_the_evaluation_of_the_float_model(config, tmp_path, monkeypatch):
    shared, seen = tmp_path / "shared", walked(monkeypatch)
    first = job.quantize(config, str(tmp_path / "first"), str(shared))
    assert seen == ["HFSource"] * NUM_BLOCKS + ["PackedCheckpoint"] * NUM_BLOCKS
    (file,) = shared.iterdir()
    assert re.fullmatch(f"{NUM_BLOCKS:05d}.outputs-[0-9a-f]{{12}}.npy", file.name)

    # In the work directory of another run, as a hard link, whose end is not that of the file.
    of_float = tmp_path / "second/evaluation/float"
    of_float.mkdir(parents=True)
    os.link(file, of_float / file.name)
    seen.clear()
    second = job.quantize(config, str(tmp_path / "second"))
    assert seen == ["PackedCheckpoint"] * NUM_BLOCKS
    assert not of_float.exists() and file.stat().st_nlink == 1
    assert second["comparison"] == first["comparison"]

    seen.clear()
    config.uniform.bits = 4
    third = job.quantize(config, str(tmp_path / "third"), str(shared))
    assert seen == ["PackedCheckpoint"] * NUM_BLOCKS and [*shared.iterdir()] == [file]
    assert third["perplexity_float"] == first["perplexity_float"]
    assert third["comparison"]["kl_mean"] != first["comparison"]["kl_mean"]

    # Another text is another evaluation.
    config.evaluation.seqlen = 16
    job.quantize(config, str(tmp_path / "fourth"), str(shared))
    assert len(list(shared.iterdir())) == 2


def test_a_full_disk_is_said_before_the_shared_evaluation_is_made(config, tmp_path, monkeypatch):
    monkeypatch.setattr("gptvq_jax.files.disk_space._free", lambda path: 1000)
    with pytest.raises(OSError, match=f"{tmp_path}/shared needs .* more"):
        job.quantize(config, str(tmp_path / "run"), str(tmp_path / "shared"))


# --- two models of the command line


def test_a_model_against_another_one(model_dir, other, text_files, capsys):
    text = dict(dataset=text_files[1], num_windows=3, seqlen=32)
    found = evaluate_job.compare(None, str(other), str(model_dir), **text)
    back = evaluate_job.compare(None, str(model_dir), str(other), **text)
    alone = evaluate_job.evaluate(None, str(other), **text)
    assert found["perplexity"]["value"] == pytest.approx(alone, rel=1e-6)
    assert found["perplexity_float"] == pytest.approx(back["perplexity"], rel=1e-6)
    ratio = found["log_perplexity_ratio"]["value"]
    assert ratio == pytest.approx(-back["log_perplexity_ratio"]["value"], rel=1e-5)
    assert found["same_top1"] == back["same_top1"]
    # The reference is the one whose distribution weighs.
    assert abs(found["kl_mean"]["value"] / back["kl_mean"]["value"] - 1) > 1e-3
    lines = capsys.readouterr().out.splitlines()
    labels = ["perplexity", "reference", "KL divergence", "same top-1", "protocol"]
    assert [line[:13].strip() for line in lines[:5]] == labels
    assert f" of {model_dir}; log-perplexity " in lines[1]
    itself = evaluate_job.compare(None, str(model_dir), str(model_dir), **text)
    assert itself["kl_max"]["value"] == 0 and itself["same_top1"]["value"] == 1


def test_models_of_other_vocabularies_are_refused(model_dir, text_files, tmp_path):
    text = dict(dataset=text_files[1], num_windows=2, seqlen=32)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["etaoin"])
    write_random_llama(tmp_path / "larger", tokenizer, 1, hidden=32, head_dim=16)
    with pytest.raises(ValueError, match="vocabulary of 256 tokens, .*larger of 257; compare mod"):
        evaluate_job.compare(None, str(model_dir), str(tmp_path / "larger"), **text)

    # As many tokens, but two of them changed places.
    write_random_llama(tmp_path / "swapped", byte_tokenizer(), 1, hidden=32, head_dim=16)
    path = tmp_path / "swapped/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="have other vocabularies: token .*; compare mod") as error:
        evaluate_job.compare(None, str(model_dir), str(tmp_path / "swapped"), **text)
    assert "\n" not in str(error.value)


def test_a_packed_checkpoint_is_opened_by_any_flag(config, model_dir, tmp_path, capsys):
    job.quantize(config, str(tmp_path / "run"))
    path = str(tmp_path / "run/checkpoint")
    assert evaluate_job.evaluate(None, path) == evaluate_job.evaluate(path, None)
    itself = evaluate_job.compare(path, None, path)
    assert itself["kl_mean"] == {"value": 0, "standard_error": 0}
    (tmp_path / "run/checkpoint/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        evaluate_job.compare(None, str(model_dir), path)
