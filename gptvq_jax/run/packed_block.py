"""One block at work: its layers quantized, their errors measured, itself tuned and passed on.

Its layers' Hessians come from what the quantized model has made of the calibration text, stage by
stage or all at once, or from a file of statistics.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from gptvq_jax.core import flops
from gptvq_jax.core.quantized_tensor import QuantizedTensor, dequantize_compiled
from gptvq_jax.methods.layer import Problem, most_flops, quantize_layers, row_groups
from gptvq_jax.methods.pool import parallel
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models.flops import closing_outputs, stage_flops
from gptvq_jax.models.llama import Params, get_layer, with_layer
from gptvq_jax.models.shapes import opened_width
from gptvq_jax.models.stages import CLOSING, STAGES, expert_of
from gptvq_jax.recipe import rule_text
from gptvq_jax.run import expert_moments, forward, token_weights
from gptvq_jax.run.calibrate import (
    LAST,
    Moments,
    Owner,
    crossed_stages,
    moment_flops,
    opens_again,
    owners,
)
from gptvq_jax.run.context import Context
from gptvq_jax.run.finetune import Pairs, tune_block
from gptvq_jax.run.float_moments import load_sums
from gptvq_jax.run.formats import Plan, layer_format
from gptvq_jax.run.held_out import NO_SUMS, Files, Sums, init_sums, judges, run_windows, with_judges
from gptvq_jax.run.layer_rows import layer_row
from gptvq_jax.run.objectives import (
    expert_shares,
    factor_flops,
    hessians,
    objectives,
    shift,
)
from gptvq_jax.run.statistics_file import Statistics
from gptvq_jax.run.stream_store import StreamStore
from gptvq_jax.storage.dequantize import dequantize_block
from gptvq_jax.storage.tree_io import cast_dense

STREAM = "quantized"
EXPERTS_AT_ONCE = 4
_HALF, _INNER = "half", "inner"  # x and what a stage has opened, inside the block at work


class PackedBlock:
    """One block on its way from float to packed.

    Args:
      context: of the run.
      plan: settings of layers that a budget had a say in.
      index: of the block.
      block: its parameters.
    """

    def __init__(self, context: Context, plan: Plan, index: int, block: Params):
        self._context, self._plan, self._index = context, plan, index
        self._float = self._dense = self._packed = block
        self._rows: list[dict[str, Any]] = []
        self._said_few = False  # that experts got few tokens
        settings, files = context.settings, context.files
        c = settings.calibration
        self._config, self._files = context.source.config.of_block(index), files
        self._stream = forward.STREAM if c.inputs == "float" else STREAM
        self._weights = None
        if c.gradient_groups:
            loaded = context.workdir.load_token_weights(index)
            how = c.gradient_power, c.num_windows
            self._weights = token_weights.relative(self._config, loaded, *how)
        self._reference = None
        if forward.wants_middle(settings):
            self._reference = (
                files.read(forward.STREAM, index),
                files.read(forward.MIDDLE, index),
                files.read(forward.STREAM, index + 1),
            )

    def quantized(self, goes_on: bool) -> tuple[Params, list[dict[str, Any]]]:
        """The packed block and its metrics; what follows is calibrated if it `goes_on`."""
        settings = self._context.settings
        if settings.calibration.statistics:
            statistics = Statistics(settings.calibration.statistics)
            self._quantize(self._config.linear_layers, statistics.sums(self._index, self._config))
            return self._packed, self._rows
        goes_on = goes_on and settings.calibration.inputs == "quantized"
        at = Files(self._files.read(self._stream, self._index), reference=self._reference)
        if settings.true_sequential:
            start, at = self._stage_by_stage(at)
        else:
            start = 0
            sums = None
            if self._stream == forward.STREAM:
                sums = load_sums(self._context.workdir, self._index)
            if sums is None:
                sums = self._run(at, 0, LAST - 1, self._sums(range(LAST)))
            self._quantize(self._config.linear_layers, sums)
        if settings.tune.block:
            drop_inside(self._files)
            start, at = 0, Files(self._files.read(self._stream, self._index))
            self._tune()
        if goes_on:
            with self._files.write(STREAM, self._index + 1, at.x.shape) as out:
                self._run(at, start, LAST, NO_SUMS, out)
        drop_inside(self._files)
        return self._packed, self._rows

    def _stage_by_stage(self, at: Files) -> tuple[int, Files]:
        """Quantizes the layers of one stage after the other; where the last one starts from."""
        for stage, groups in enumerate(self._config.layers.stages):
            opened, group = stage in CLOSING, list(chain(*groups))
            out, shape = nullcontext(), None
            kept = stage and not (stage == LAST - 1 and opens_again())
            if kept:
                cols = opened_width(self._config, stage - 1) if opened else at.x.shape[2]
                name = _INNER if opened else _HALF
                shape = (*at.x.shape[:2], cols)
                out = self._files.pass_on(name, self._index, shape)
            with out as writer:
                start = max(0, stage - 1)
                sums = self._run(at, start, stage, self._sums([stage]), writer)
            if opened and kept:
                at = at._replace(inner=self._files.read(_INNER, self._index))
            elif kept:
                at = at._replace(x=self._files.read(_HALF, self._index), inner=None)
            self._quantize(group, sums)
        return LAST - 1 if kept else LAST - 2, at

    def _sums(self, stages: Sequence[int]) -> Sums:
        c, crosses = self._context.settings.calibration, self._reference is not None
        of_sums = self._weights, crosses, c.held_out > 0, c.products
        return init_sums(self._config, self._float, stages, *of_sums)

    def _run(self, at: Files, start: int, stop: int, sums: Sums, out=None) -> Sums:
        with self._context.stopwatch.stage("hessians" if sums.fitted.inputs else "advance"):
            self._context.progress.note(f"block {self._index} {STAGES[min(stop, LAST - 1)]}")
            shape = at.x.shape
            stages = range(start, stop)
            crossed = crossed_stages(self._config, sums.fitted)
            self._context.stopwatch.flops(
                stage_flops(self._config, stages, *shape[:2])
                + moment_flops(self._config, sums.fitted, shape[0] * shape[1])
                + closing_outputs(self._config, crossed, *shape[:2])
            )
            sums = run_windows(
                self._config,
                self._dense,
                at,
                start,
                stop,
                sums,
                self._context.settings.calibration,
                self._weights,
                out,
                self._float if sums.fitted.crosses else None,
            )
            return jax.block_until_ready(sums)

    def _quantize(self, names: Sequence[str], sums: Sums) -> None:
        """Puts packed layers, and dense ones as they will be, in place of the float ones."""
        for part in _at_once(names):
            self._quantize_part(part, sums)

    def _quantize_part(self, names: Sequence[str], sums: Sums) -> None:
        progress = self._context.progress
        with self._context.stopwatch.stage("quantize"):
            start = time.perf_counter()
            problems = self._problems(names, sums.fitted)
            owned = [o for name in names for o in owners(self._config, name, self._weights)]
            others = hessians(sums.held_out, wanted=owned) if sums.held_out.inputs else {}
            judged_by = [
                judges(self._config, problem, others, self._weights, name)
                for problem, name in zip(problems, names, strict=True)
            ]
            problems = [with_judges(*pair) for pair in zip(problems, judged_by, strict=True)]
            tensors = self._stored(problems)
            kernels = parallel(_values, tensors)
            measured = zip(problems, tensors, kernels, judged_by, strict=True)
            rows = parallel(lambda of_layer: layer_row(*of_layer), list(measured))
            rows = self._with_tokens(names, rows, sums.fitted)
            self._context.stopwatch.flops(_flops(problems, sums.fitted, owned, 1 + bool(others)))
            seconds = time.perf_counter() - start
        total = sum(problem.weight.size for problem in problems)
        for name, problem, tensor, kernel, row in zip(
            names, problems, tensors, kernels, rows, strict=True
        ):
            packed = tensor if isinstance(tensor, QuantizedTensor) else kernel.T
            self._packed = with_layer(self._packed, name, packed)
            self._dense = with_layer(self._dense, name, kernel.T)
            share = problem.weight.size / total  # they are quantized side by side
            where = {"kind": "layer", "block": self._index, "layer": name}
            self._rows.append({**where, **row, **self._rule(name), "seconds": seconds * share})
            progress.advance(f"block {self._index} {name}")

    def _rule(self, name: str) -> dict[str, Any]:
        """What a layer's row says of the recipe, if there is one."""
        settings = self._context.settings
        of = layer_format(settings, self._index, name)
        text = rule_text(settings.recipe, of.rule) if of.rule else None
        return {"method": of.method, "rule": text} if settings.recipe else {}

    def _stored(self, problems: Sequence[Problem]) -> list[QuantizedTensor | np.ndarray]:
        """What layers are stored as: the weight (R, C) itself of one that stays dense."""
        tensors = iter(quantize_layers([p for p in problems if p.quantize is not None]))
        dtype = self._context.settings.dense_dtype
        return [
            cast_dense(p.weight, dtype, p.name) if p.quantize is None else next(tensors)
            for p in problems
        ]

    def _problems(self, names: Sequence[str], moments: Moments) -> list[Problem]:
        settings = self._context.settings
        least = settings.calibration.expert_tokens
        owned = {o for name in names for o in owners(self._config, name, self._weights)}
        found = objectives(moments, settings.damping, f"layers_{self._index}", least, owned)
        weights = {n: jnp.asarray(get_layer(self._float, n)["kernel"]).T for n in names}

        def problem(name: str) -> Problem:
            groups, of_layer = owners(self._config, name, self._weights), []
            for owner, rows in zip(groups, row_groups(weights[name], len(groups)), strict=True):
                objective = found[owner]
                if owner in moments.crosses:
                    shifted = shift(self._config, moments, owner, rows, objective.hessian, least)
                    objective = objective._replace(shift=shifted)
                of_layer.append(objective)
            key = jax.random.fold_in(jax.random.key(settings.seed), self._index)
            of = layer_format(settings, self._index, name, self._plan)
            return Problem(
                METHODS[of.coder].quantize if of.coder else None,
                of.settings,
                weights[name],
                of_layer,
                jax.random.fold_in(key, self._config.linear_layers.index(name)),
                settings.calibration.asymmetry,
                f"layers_{self._index}/{name}",
                products=settings.solve_products,
            )

        return [problem(name) for name in names]

    def _with_tokens(
        self, names: Sequence[str], rows: list[dict[str, Any]], moments: Moments
    ) -> list[dict[str, Any]]:
        """Rows of experts also say how many tokens these got, and what they took of others."""
        part = expert_shares(moments, self._context.settings.calibration.expert_tokens)
        text = expert_moments.few_tokens(moments.tokens, part, f"layers_{self._index}")
        if text and not self._said_few:
            logging.warning(text)
        self._said_few = self._said_few or bool(text)
        found = []
        for name, row in zip(names, rows, strict=True):
            owner = owners(self._config, name, self._weights)[0]
            if owner in part:
                tokens = int(moments.tokens[owner])
                row = {**row, "expert_tokens": tokens, "shared_hessian": part[owner]}
            found.append(row)
        return found

    def _tune(self) -> None:
        """Tunes what is continuous in the block."""
        settings, progress = self._context.settings, self._context.progress
        del self._float, self._dense  # the tuning needs their room on the device
        with self._context.stopwatch.stage("tune"):
            start = time.perf_counter()
            targets = self._files.read(forward.STREAM, self._index + 1)
            self._packed, row = tune_block(
                self._config,
                self._packed,
                Pairs(self._files.read(STREAM, self._index), targets),
                settings.tune,
                held_out=settings.calibration.held_out,
                dense_dtype=settings.dense_dtype,
                order=np.random.default_rng([settings.seed, self._index]),
                name=f"layers_{self._index}",
                on_epoch=progress.advance,
                stopwatch=self._context.stopwatch,
            )
            progress.advance(steps=settings.tune.epochs - row["epochs"])
            seconds = time.perf_counter() - start
            self._dense = dequantize_block(self._packed)
        self._rows.append({"kind": "block", "block": self._index, **row, "seconds": seconds})


def drop_inside(files: StreamStore) -> None:
    """Forgets what stages have left inside a block."""
    for stream in (_HALF, _INNER):
        files.drop(stream)


def _at_once(names: Sequence[str]) -> list[list[str]]:
    """Layers that are quantized together: of a few experts, or the Hessians of all take room."""
    parts: dict[int | None, list[str]] = {}
    for name in names:
        number = expert_of(name)
        part = None if number is None else number // EXPERTS_AT_ONCE
        parts.setdefault(part, []).append(name)
    return list(parts.values())


def _values(stored: QuantizedTensor | np.ndarray) -> jax.Array:
    """The weight (R, C) that is multiplied, float32."""
    if isinstance(stored, QuantizedTensor):
        return dequantize_compiled(stored)
    return jnp.asarray(stored, jnp.float32)


def _flops(
    problems: Sequence[Problem], moments: Moments, owned: Sequence[Owner], measured: int
) -> float:
    """Of quantizing layers and measuring their errors so many times."""
    own = moments._replace(inputs={owner: moments.inputs[owner] for owner in owned})
    coded = [p for p in problems if p.quantize is not None]
    measuring = sum(2 * measured * flops.unit(*p.weight.shape) for p in problems)
    return factor_flops(own) + sum(map(most_flops, coded)) + measuring
