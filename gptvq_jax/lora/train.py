"""The job of scripts/lora.py: trains an adapter on a model that stays as it is.

Every `eval_every` steps the held-out loss is measured, the best state so far is written in PEFT's
format, and all of the state is saved, so that a stopped training goes on from there: the batches
and the dropout of a step depend on its number alone. Where a loss is not finite, the training goes
back to the last such point with half the learning rate, at most three times in a row.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from gptvq_jax.adapters.adapter import Adapter, LowRank
from gptvq_jax.adapters.peft_config import scale
from gptvq_jax.adapters.peft_files import write_adapter
from gptvq_jax.console.progress import Progress
from gptvq_jax.core.seeds import random_key
from gptvq_jax.lora.examples import Examples, batch_of, load_examples
from gptvq_jax.lora.frozen_model import Adapters, FrozenModel
from gptvq_jax.lora.optimizer import State, from_host, learning_rate, start, to_host, updated
from gptvq_jax.lora.settings import LoraSettings
from gptvq_jax.lora.targets import target_shapes
from gptvq_jax.lora.workdir import LoraDir
from gptvq_jax.models.source import ModelSource
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.open_any import open_any

TRIES = 3  # with a lower learning rate each, from one point


class _Point(NamedTuple):
    """Where the training is, and what it has found."""

    step: int
    state: State
    best: Adapters
    best_step: int
    best_loss: float
    first_loss: float  # held out, before the first step
    stale: int  # looks since the best
    factor: float  # of the learning rate


def train(checkpoint: str | None, model: str | None, out: str, settings: LoraSettings) -> float:
    """Trains an adapter, writes it to `out`, prints what it gained.

    Args:
      checkpoint, model: exactly one of them: a checkpoint directory, or any model, as `open_any`
        takes it.
      out: directory for the adapter; one that holds a stopped training of the same settings goes
        on with it.
      settings: of the training.

    Returns:
      The best held-out loss, in nats per token.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: bad input, in one line with the way out.
    """
    if (checkpoint is None) == (model is None):
        raise ValueError("pass either --checkpoint=DIR or --model=NAME")
    source = PackedCheckpoint(checkpoint) if checkpoint else open_any(model)
    random_key(settings.seed)  # a seed that is none comes first
    shapes = target_shapes(source.config, settings.targets)
    examples, held_out = load_examples(source, settings)
    digest = hashlib.sha256(examples.tokens.tobytes() + held_out.tokens.tobytes()).hexdigest()
    described = {**dataclasses.asdict(settings), "base": source.fingerprint, "text": digest[:16]}
    with LoraDir(out, described) as workdir:
        trainer = _Trainer(source, settings, shapes, examples, held_out, workdir)
        point = trainer.run()
    values = sum(leaf.size for layer in point.best.values() for leaf in layer.values())
    print(
        f"held-out loss {point.first_loss:.4f} -> {point.best_loss:.4f} nats per token at step "
        f"{point.best_step} of {point.step} (perplexity {_exp(point.first_loss):.2f} -> "
        f"{_exp(point.best_loss):.2f})"
    )
    print(f"{len(point.best)} adapters of rank {settings.rank}, {values} values, written to {out}")
    return point.best_loss


class _Trainer:
    def __init__(
        self,
        source: ModelSource,
        settings: LoraSettings,
        shapes: Mapping[str, tuple[int, int]],
        examples: Examples,
        held_out: Examples,
        workdir: LoraDir,
    ):
        self._source, self._settings, self._workdir = source, settings, workdir
        self._examples, self._held_out = examples, held_out
        self._scale = scale(settings.alpha, settings.rank, settings.rslora)
        self._start = start(dict(shapes), settings)
        self._model = FrozenModel(source, self._scale)
        self._key = random_key(settings.seed)

    def run(self) -> _Point:
        point = self._resumed()
        with Progress(self._settings.steps, "adapter", "step") as progress:
            if point is None:
                progress.note("held-out loss of the model as it is")
                point = self._first()
            else:
                progress.skip(point.step)
            tries = 0
            while point.step < self._settings.steps and not self._is_stale(point):
                reached = self._stretch(point, progress)
                if reached is not None:
                    point, tries = reached, 0
                    continue
                tries += 1
                point = point._replace(factor=point.factor / 2)
                if tries > TRIES:
                    raise ValueError(
                        f"the loss after step {point.step} is not finite, even with 1/{2**TRIES} "
                        f"of the learning rate; {self._workdir.path} keeps the adapter of step "
                        f"{point.best_step}: set a lower --lr, and another --out"
                    )
                logging.warning(
                    "a loss after step %d is not finite: on from there with %g of the learning "
                    "rate",
                    point.step,
                    point.factor,
                )
        return point

    def _is_stale(self, point: _Point) -> bool:
        return 0 < self._settings.patience <= point.stale

    def _first(self) -> _Point:
        loss = self._held_out_loss(self._start.adapters)
        if not math.isfinite(loss):
            raise ValueError(
                f"the held-out loss of {self._source.name} without an adapter is not finite; "
                "quantize the model again, or look at it with scripts/evaluate.py"
            )
        adapters = self._start.adapters
        point = _Point(0, self._start, adapters, 0, loss, loss, 0, 1.0)
        self._keep(point, [{"kind": "held_out", "step": 0, "loss": loss}])
        self._write(adapters)
        return point

    def _stretch(self, point: _Point, progress: Progress) -> _Point | None:
        """On to the next look at the held-out loss; None if a loss on the way is not finite."""
        state, rows, begun = point.state, [], point.step
        end = min(self._settings.steps, (begun // self._every + 1) * self._every)
        for step in range(begun + 1, end + 1):
            before = time.perf_counter()
            rate = learning_rate(step, self._settings) * point.factor
            tokens, learned = batch_of(
                self._examples, step, self._settings.batch, self._settings.seed
            )
            loss, gradient = self._model.loss_and_gradient(
                state.adapters, tokens, learned, self._key_of(step), self._settings.dropout
            )
            state, norm = updated(state, gradient, rate, self._settings)
            loss = float(loss)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                progress.skip(begun + 1 - step)
                return None
            seconds = time.perf_counter() - before
            rows.append(
                {
                    "kind": "step",
                    "step": step,
                    "loss": loss,
                    "learning_rate": rate,
                    "gradient_norm": norm,
                    "seconds": seconds,
                }
            )
            if step < end:
                progress.advance(f"loss {loss:.4f}")
        progress.note("held-out loss")
        held_out = self._held_out_loss(state.adapters)
        if not math.isfinite(held_out):
            progress.skip(begun + 1 - end)
            return None
        progress.advance(f"loss {loss:.4f}, held out {held_out:.4f}")
        rows.append({"kind": "held_out", "step": end, "loss": held_out})
        point = point._replace(step=end, state=state, stale=point.stale + 1)
        if held_out < point.best_loss:
            point = point._replace(best=state.adapters, best_step=end, best_loss=held_out, stale=0)
            self._write(state.adapters)
        if end == self._settings.steps or self._is_stale(point):
            rows.append(self._summary(point))
        self._keep(point, rows)
        return point

    @property
    def _every(self) -> int:
        return self._settings.eval_every

    def _summary(self, point: _Point) -> dict[str, Any]:
        return {
            "kind": "summary",
            "step": point.step,
            "held_out_before": point.first_loss,
            "held_out_best": point.best_loss,
            "best_step": point.best_step,
            "bits_per_value": getattr(self._source, "manifest", {}).get("bits_per_value"),
        }

    def _key_of(self, step: int):
        return jax.random.fold_in(self._key, step)

    def _held_out_loss(self, adapters: Adapters) -> float:
        """In nats per token that is learned."""
        tokens, learned = self._held_out
        batch = self._settings.batch
        sums = [
            self._model.loss(adapters, tokens[i : i + batch], learned[i : i + batch])
            for i in range(0, len(tokens), batch)
        ]
        return sum(sums) / int(learned.sum())

    def _write(self, adapters: Adapters) -> None:
        layers = {
            name: LowRank(np.asarray(leaf["a"]), np.asarray(leaf["b"]), self._scale)
            for name, leaf in adapters.items()
        }
        s = self._settings
        write_adapter(
            self._workdir.path,
            self._source.config,
            Adapter(layers, base_name(self._source)),
            alpha=s.alpha,
            rslora=s.rslora,
            dropout=s.dropout,
        )

    def _keep(self, point: _Point, rows: list[dict[str, Any]]) -> None:
        self._workdir.append(rows)
        numbers = {
            name: getattr(point, name)
            for name in ("best_step", "best_loss", "first_loss", "stale", "factor")
        }
        best = to_host(self._start._replace(adapters=point.best))
        self._workdir.save(point.step, numbers, {"state": to_host(point.state), "best": best})

    def _resumed(self) -> _Point | None:
        found = self._workdir.load()
        if found is None:
            return None
        step, numbers, arrays = found
        state, best = (from_host(arrays[name], self._start) for name in ("state", "best"))
        return _Point(step, state, best.adapters, **numbers)


def base_name(source: ModelSource) -> str:
    """What an adapter's file calls its base: the float model of a packed one."""
    return getattr(source, "manifest", {}).get("source", {}).get("name") or source.name


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
