"""Tuning of the whole model: AdamW on every continuous leaf against the float model's next tokens.

The loss is the KL divergence of the packed model's next tokens from the float model's, in nats per
token, of the model as it would be stored. Every few steps windows that are held out are looked at:
the state with the least divergence there is kept, and where looks gain too little the tuning ends.
A step that is not finite leads back to the last look, with half the rate, three times. After a look
codes may be chosen again, on the windows of the step to come: they are kept if a second look finds
a lower divergence, and otherwise reverted, which halves how much may change the next time.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from absl import logging

from gptvq_jax.config import FinetuneSettings
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.methods.leaf_steps import Rates
from gptvq_jax.models import flops
from gptvq_jax.run import tune_state
from gptvq_jax.run.activations import Activations
from gptvq_jax.run.recode_model import recode_model
from gptvq_jax.run.student import States, Student
from gptvq_jax.run.tune_state import Place

MOST_TRIES = 3
_SAVE_SECONDS = 60.0  # between two saved states, at least; a kill costs no more than that
Log = Callable[[dict[str, Any]], None]


class Text(NamedTuple):
    """Windows of tokens (n, T), the last ones held out, and what the float model makes of them."""

    tokens: np.ndarray
    outputs: Activations  # of its last block (n, T, hidden)


class Tuned(NamedTuple):
    """What came of it."""

    states: States  # with the least divergence on the windows held out
    summary: dict[str, Any]


def tune_model(
    student: Student,
    text: Text,
    settings: FinetuneSettings,
    directory: Path,
    log: Log,
    progress: Progress,
    stopwatch: Stopwatch,
) -> Tuned:
    """Tunes, from where a killed process was.

    Args:
      student: the packed model.
      text: settings.num_windows + settings.held_out windows.
      settings: of the tuning.
      directory: of the saved states.
      log: receives rows of kind "tune": of each step "step", "loss", "rate" (a share of the
        settings' rates), "seconds", "tflop"; of each look "step", "held_out", its divergence. And
        of kind "codes", of each time that these are chosen again: "step", "changed" of "vectors",
        "part" of share and trust, "held_out_before", "held_out_after", "kept", "seconds".
      progress: of settings.steps steps.
      stopwatch: receives the seconds of stage "tune model".

    Returns:
      The best states; and "steps", "best_step", "held_out_before", "held_out_after",
      "tries": how often a step was not finite; with settings.codes also "recoded", "kept": how
      often codes were chosen again, and kept.

    Raises:
      ValueError: the loss is not finite at the start, or again and again.
    """
    run = _Run(student, text, settings, stopwatch)
    schedule = _schedule(settings)
    start = student.states()
    with stopwatch.stage("tune model"):
        place = tune_state.load(directory, start, student.leaves)
        if place is None:
            before = run.look(start)
            if not np.isfinite(before):
                raise ValueError(
                    "the KL divergence of the packed model from the float model is not finite on "
                    "the windows held out; check both with scripts/evaluate.py --against"
                )
            log({"kind": "tune", "step": 0, "held_out": before})
            place = Place(0, start, start, start, before)
            tune_state.save(directory, place, student.leaves)
        else:
            for name in ("states", "best", "good"):
                setattr(place, name, student.placed(getattr(place, name)))
        progress.skip(place.step)
        saved = time.monotonic()
        while place.step < settings.steps and not place.stopped:
            began = time.perf_counter()
            rate = place.rate * float(schedule(place.step))
            loss, states = run.step(place, rate)
            if not np.isfinite(loss) or states is None:
                _back(place, settings)
                tune_state.save(directory, place, student.leaves)
                progress.note(f"back at step {place.step}, with {place.rate:g} of the rates")
                continue
            place.step, place.states = place.step + 1, states
            row = {"kind": "tune", "step": place.step, "loss": loss, "rate": rate}
            row |= {"seconds": time.perf_counter() - began, "tflop": run.step_flops / 1e12}
            log(row)
            progress.advance(f"KL {loss:.4f}, held out {place.lowest:.4f}")
            if place.step % settings.evaluate_every == 0 or place.step == settings.steps:
                held_out = run.look(place.states)
                log({"kind": "tune", "step": place.step, "held_out": held_out})
                if not np.isfinite(held_out):
                    _back(place, settings)
                else:
                    _judge(place, held_out, settings)
                    if run.recodes_at(place):
                        log(run.recode(place, held_out))
                tune_state.save(directory, place, student.leaves)
                saved = time.monotonic()
            elif time.monotonic() - saved >= _SAVE_SECONDS:
                tune_state.save(directory, place, student.leaves)
                saved = time.monotonic()
        progress.advance(steps=settings.steps - place.step)
        # Of this process or of an earlier one, which has logged it.
        summary = {"steps": place.step, "best_step": place.best_step, "tries": place.tries}
        if settings.codes:
            summary |= {"recoded": place.recoded, "kept": place.kept}
        return Tuned(place.best, {**summary, "held_out_after": place.lowest})


class _Run:
    """Steps and looks at the text."""

    def __init__(
        self, student: Student, text: Text, settings: FinetuneSettings, stopwatch: Stopwatch
    ):
        self._student, self._text, self._settings = student, text, settings
        self._stopwatch = stopwatch
        self._orders: dict[int, np.ndarray] = {}
        shape = settings.micro_batch, text.tokens.shape[1]
        parts = settings.batch_size // settings.micro_batch
        self.step_flops = parts * flops.model_tuning(student.config, *shape)

    def step(self, place: Place, rate: float) -> tuple[float, States | None]:
        """The loss before a step, and states after it; None where they are not finite."""
        s = self._settings
        losses, gradients = self._student.gradients(place.states, *self._batch(place.step))
        rates = Rates(
            *(r * rate for r in (s.learning_rate, s.scale_learning_rate, s.norm_learning_rate)),
            s.b1,
            s.b2,
            s.weight_decay,
        )
        states, finite = self._student.update(place.states, gradients, rates)
        return float(np.mean(losses)), states if all(finite) else None

    def look(self, states: States) -> float:
        """The mean KL divergence on the windows held out, in nats per token, exact in float32."""
        kept_out = slice(self._settings.num_windows, None)
        tokens, reference = self._text.tokens[kept_out], self._text.outputs[kept_out]
        return float(np.float32(np.mean(self._student.divergences(states, tokens, reference))))

    def recodes_at(self, place: Place) -> bool:
        """Whether codes are chosen again after the look at a step."""
        s = self._settings
        looks = -(-place.step // s.evaluate_every)
        return s.codes and not place.stopped and looks % s.codes_every == 0

    def recode(self, place: Place, before: float) -> dict[str, Any]:
        """Chooses codes again, and keeps them if the windows held out gain by it; a row on that.

        Args:
          place: after a look, whose divergence is `before`.
        """
        began, batch = time.perf_counter(), self._batch(place.step)
        found = recode_model(
            self._student, place.states, *batch, self._settings, place.codes_part, self._stopwatch
        )
        after = self.look(found.states)
        row = {"kind": "codes", "step": place.step, "part": place.codes_part}
        row |= {"changed": found.changed, "vectors": found.vectors}
        row |= {"held_out_before": before, "held_out_after": after, "kept": after < before}
        place.recoded += 1
        if after < before:
            place.kept += 1
            place.states = place.good = found.states
            if after < place.lowest * (1 - self._settings.tolerance):
                place.stale = 0
            if after < place.lowest:
                place.best, place.best_step, place.lowest = found.states, place.step, after
        else:
            place.codes_part /= 2
        return row | {"seconds": time.perf_counter() - began}

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the windows of a step, and what the float model makes of them."""
        windows = self._windows(step)
        return self._text.tokens[windows], self._text.outputs[windows]

    def _windows(self, step: int) -> np.ndarray:
        s = self._settings
        epoch, of_epoch = divmod(step, s.steps_of_epoch)
        if epoch not in self._orders:
            order = np.random.default_rng([s.seed, epoch]).permutation(s.num_windows)
            self._orders = {epoch: order}
        return self._orders[epoch][of_epoch * s.batch_size :][: s.batch_size]


def _schedule(settings: FinetuneSettings) -> optax.Schedule:
    """The share of the rates at a step, from 0."""
    warm = min(round(settings.warmup * settings.steps), settings.steps - 1)
    first = 1 / (warm + 1)
    return optax.warmup_cosine_decay_schedule(first, 1.0, warm, settings.steps, settings.final_rate)


def _judge(place: Place, held_out: float, settings: FinetuneSettings) -> None:
    """After a look: what is best, and whether to stop."""
    gains = held_out < place.lowest * (1 - settings.tolerance)
    place.stale = 0 if gains else place.stale + 1
    if held_out < place.lowest:
        place.best, place.best_step, place.lowest = place.states, place.step, held_out
    place.good, place.good_step = place.states, place.step
    place.stopped = place.stale >= settings.patience


def _back(place: Place, settings: FinetuneSettings) -> None:
    """After a step that was not finite.

    Raises:
      ValueError: it was one too many.
    """
    if place.tries == MOST_TRIES:
        raise ValueError(
            f"the loss is not finite after step {place.step}, as {MOST_TRIES} times before with "
            f"higher rates; lower finetune.learning_rate={settings.learning_rate:g}, "
            f"scale_learning_rate={settings.scale_learning_rate:g} and norm_learning_rate="
            f"{settings.norm_learning_rate:g}, and pass another --workdir"
        )
    logging.warning(
        "the loss is not finite after step %d: back to step %d, with half the learning rates",
        place.step,
        place.good_step,
    )
    place.tries, place.rate = place.tries + 1, place.rate / 2
    place.step, place.states = place.good_step, place.good


def moves(student: Student, states: States) -> Iterator[dict[str, Any]]:
    """Rows of kind "moved": what each parameter of each leaf has moved, relative to its size."""
    for leaf, of_leaf in student.distances(states).items():
        for parameter, distance in of_leaf.items():
            yield {"kind": "moved", "leaf": leaf, "parameter": parameter, "moved": distance}
