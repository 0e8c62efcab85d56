"""Training of an adapter: it gains, goes on after a kill to the same bytes, and survives NaN."""

import dataclasses
import fcntl
import json
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import byte_tokenizer, text_files  # noqa: F401 - fixture

from gptvq_jax.adapters.adapted_source import AdaptedSource
from gptvq_jax.adapters.peft_files import WEIGHTS, read_adapter
from gptvq_jax.lora import train as job
from gptvq_jax.lora.examples import load_examples
from gptvq_jax.lora.frozen_model import FrozenModel
from gptvq_jax.lora.optimizer import learning_rate
from gptvq_jax.lora.settings import LoraSettings
from gptvq_jax.models.open import open_source
from gptvq_jax.run.evaluate import perplexity
from gptvq_jax.study.random_model import write_random_llama

STEP = FrozenModel.loss_and_gradient


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_random_llama(path, byte_tokenizer(), num_blocks=2, hidden=32, head_dim=16)
    return str(path)


@pytest.fixture(scope="module")
def settings(text_files):  # noqa: F811
    return LoraSettings(
        rank=2,
        alpha=4.0,
        targets=("q_proj", "down_proj"),
        dropout=0.1,
        dataset=text_files[0],
        seqlen=24,
        num_windows=7,
        held_out=3,
        steps=6,
        batch=2,
        lr=0.02,
        warmup=1,
        eval_every=2,
    )


@pytest.fixture(scope="module")
def trained(model, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "adapter"
    return out, job.train(None, model, str(out), settings)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_seconds(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out)]


def fails_at(monkeypatch, *numbers, how):
    """The calls of these numbers, from 1, raise what `how` is or have the loss that it is."""
    calls = []

    def step(*args):
        calls.append(1)
        loss, gradient = STEP(*args)
        if len(calls) in numbers:
            if isinstance(how, type):
                raise how
            loss = jnp.float32(how)
        return loss, gradient

    monkeypatch.setattr(FrozenModel, "loss_and_gradient", step)
    return calls


def test_the_best_state_is_in_the_file(model, settings, trained, capsys):
    out, best = trained
    found = rows(out)
    held_out = [row["loss"] for row in found if row["kind"] == "held_out"]
    assert len(held_out) == 4 and best == min(held_out) < held_out[0]
    (summary,) = (row for row in found if row["kind"] == "summary")
    assert summary["held_out_before"] == held_out[0] and summary["held_out_best"] == best
    assert summary["bits_per_value"] is None
    steps = [row for row in found if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in steps] == [
        learning_rate(i, settings) for i in range(1, 7)
    ]
    # Merged, it has the perplexity that was measured beside the weights.
    source = open_source(model)
    adapted = AdaptedSource(source, read_adapter(out, source.config))
    windows = load_examples(source, settings)[1].tokens
    assert perplexity(adapted, windows) == pytest.approx(np.exp(best), rel=1e-4)
    assert perplexity(source, windows) == pytest.approx(np.exp(held_out[0]), rel=1e-4)


def test_the_learning_rate_rises_and_falls():
    settings = LoraSettings(steps=20, warmup=4, lr=1.0)
    rates = [learning_rate(step, settings) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b > 0 for a, b in zip(rates[3:], rates[4:], strict=False))
    assert LoraSettings(steps=3).warmup == 3 and LoraSettings(steps=30).warmup == 10


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)]
)
def test_what_was_stopped_goes_on_to_the_same_bytes(
    step, model, settings, trained, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        fails_at(patch, step, how=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            job.train(None, model, str(tmp_path), settings)
    (tmp_path / "state-000009.partial").mkdir()  # as a kill may leave it
    calls = fails_at(monkeypatch, how=0)
    assert job.train(None, model, str(tmp_path), settings) == trained[1]
    assert len(calls) == 6 - (step - 1) // 2 * 2
    assert (tmp_path / WEIGHTS).read_bytes() == (trained[0] / WEIGHTS).read_bytes()
    assert without_seconds(tmp_path) == without_seconds(trained[0])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in trained[0].iterdir()}


def test_what_is_finished_is_not_done_again(model, settings, trained, monkeypatch, capsys):
    calls = fails_at(monkeypatch, how=0)
    assert job.train(None, model, str(trained[0]), settings) == trained[1]
    assert not calls and "held-out loss" in capsys.readouterr().out


def test_a_loss_that_is_not_finite(model, settings, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        fails_at(patch, 4, how=np.nan)
        job.train(None, model, str(tmp_path / "once"), settings)
    assert "after step 2 is not finite: on from there with 0.5 of the learning rate" in caplog.text
    steps = [row for row in rows(tmp_path / "once") if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    factors = [row["learning_rate"] / learning_rate(row["step"], settings) for row in steps]
    assert factors == [1, 1, 0.5, 0.5, 0.5, 0.5]
    calls = fails_at(monkeypatch, *range(3, 99), how=np.inf)
    with pytest.raises(
        ValueError, match="step 2 is not finite, even with 1/8 of the learning rate"
    ):
        job.train(None, model, str(tmp_path / "always"), settings)
    assert len(calls) == 2 + 4
    config = open_source(model).config
    assert read_adapter(tmp_path / "always", config).layers.keys()


def test_it_stops_early(model, settings, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(job._Trainer, "_held_out_loss", lambda *_: next(losses))
    changed = dataclasses.replace(settings, steps=20, patience=2)
    assert job.train(None, model, str(tmp_path), changed) == 2.0
    summary = rows(tmp_path)[-1]
    assert (summary["kind"], summary["step"], summary["best_step"]) == ("summary", 6, 2)


def test_other_settings_are_refused(model, settings, trained, tmp_path):
    changed = dataclasses.replace(settings, lr=0.5)
    with pytest.raises(ValueError, match=r"begun with other settings: lr: 0.02 -> 0.5. Give the"):
        job.train(None, model, str(trained[0]), changed)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(ValueError, match="holds manifest.json, .* pass another --out"):
        job.train(None, model, str(tmp_path), settings)


def test_another_process_is_training(model, settings, trained):
    with (
        open(trained[0] / "lock") as held,
        pytest.raises(ValueError, match="another process is training in .*; wait for it or pass"),
    ):
        fcntl.flock(held, fcntl.LOCK_EX)
        job.train(None, model, str(trained[0]), settings)


def test_a_damaged_state(model, settings, trained, tmp_path):
    out = tmp_path / "adapter"
    shutil.copytree(trained[0], out)
    (out / "state-000006/state.json").write_text("{")
    with pytest.raises(ValueError, match="state-000006 is damaged .*; remove it, and the training"):
        job.train(None, model, str(out), settings)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"targets": ("q_proj", "qproj")},
            "--targets=qproj names no linear layer .* q_proj, k_proj",
        ),
        ({"num_windows": 1}, "--num_windows=1 are fewer than a batch of 2; set --num_windows=2"),
        ({"rank": 0}, "--rank=0 must be at least 1"),
        ({"lr": float("nan")}, "--lr=nan must be above 0"),
        ({"dropout": 1.0}, "--dropout=1.0 must be from 0 to below 1"),
        ({"warmup": 9}, "--warmup=9 must be at most --steps=6"),
        ({"seed": -1}, "seed=-1 must be from 0 to"),
        ({"seqlen": 10**6}, "--seqlen=1000000 is beyond the"),
    ],
)
def test_bad_settings(fields, message, model, settings, tmp_path):
    with pytest.raises(ValueError, match=message):
        job.train(None, model, str(tmp_path / "a"), dataclasses.replace(settings, **fields))
    assert not (tmp_path / "a").exists()


def test_which_model(settings):
    with pytest.raises(ValueError, match="pass either --checkpoint=DIR or --model=NAME"):
        job.train(None, None, "a", settings)
