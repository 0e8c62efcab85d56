"""The quantizing pass: one transformer block after another becomes packed.

For each block: the Hessians of its layers on what the quantized model has made of the calibration
text, the layers quantized, the block tuned where that is asked for, written packed, the activations
taken through it, and the block dropped. With `true_sequential` the block is gone through once, in
stages: what a stage's layers read comes from the quantized layers before them. Otherwise all layers
see the float layers of their block, which is gone through a second time once they are quantized.

Device memory holds one block, its Hessians and a batch; host memory a block, and activations are
on disk. Memory grows neither with depth nor with the calibration tokens.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.config import RunSettings, to_dict
from gptvq_jax.core import flops, metrics
from gptvq_jax.core.code_usage import code_metrics
from gptvq_jax.core.quantized_tensor import QuantizedTensor, dequantize_compiled
from gptvq_jax.methods.layer import (
    Problem,
    most_flops,
    quantize_layers,
    relative_error,
    row_groups,
)
from gptvq_jax.methods.pool import parallel
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.flops import closing_outputs, stage_flops
from gptvq_jax.models.llama import (
    LINEAR_GROUPS,
    LINEAR_LAYERS,
    STAGES,
    Params,
    get_layer,
    with_layer,
)
from gptvq_jax.run import forward
from gptvq_jax.run.calibrate import (
    LAST,
    Files,
    Moments,
    crossed_stages,
    factor_flops,
    init_moments,
    moment_flops,
    objectives,
    owners,
    relative_weights,
    run_windows,
    shift,
)
from gptvq_jax.run.context import Context
from gptvq_jax.run.embedding import write_embeddings
from gptvq_jax.run.finetune import Pairs, tune_block
from gptvq_jax.run.float_moments import load_moments
from gptvq_jax.run.stream_store import StreamStore
from gptvq_jax.storage.checkpoint import CheckpointWriter, dequantize_block, dequantize_tree

Plan = Mapping[tuple[int, str], Any]  # (block, layer) -> settings of the method
STREAM = "quantized"
_HALF, _INNER = "half", "inner"  # x and what a stage has opened, inside the block at work


class Quantize:
    """A visitor of the blocks, upwards: writes the packed checkpoint but for its manifest.

    Args:
      context: of the run.
      tokens: calibration windows (n, T).
      plan: settings of layers that differ from `settings.method_settings`.
    """

    def __init__(self, context: Context, tokens: np.ndarray, plan: Plan):
        self._context, self._tokens, self._plan = context, tokens, plan
        self.files = context.files
        settings = context.settings
        self.writer = CheckpointWriter(context.workdir.checkpoint, settings.dense_dtype)
        self.finished = self.writer.finished_blocks()
        self._last = num_quantized(settings, context.source.config)
        self._float_inputs = settings.calibration.inputs == "float"
        self.releases = (STREAM, forward.STREAM, forward.MIDDLE)

    def position(self, order: range) -> int:
        """Blocks of the checkpoint; what a killed run has left of the next one is dropped."""
        files = self._context.files
        files.drop(STREAM, keep=range(self.finished + 1))
        _drop_inside(files)
        workdir = self._context.workdir
        rows = [row for row in workdir.metrics() if row["kind"] in ("layer", "block")]
        workdir.keep_metrics([row for row in rows if row["block"] < self.finished])
        if self.finished:
            self._mend()
        return self.finished

    def begin(self) -> None:
        """Stores what is outside the blocks, and embeds the tokens as the model will."""
        source, settings, _, _, stopwatch = self._context
        with stopwatch.stage("embed"):
            outer = source.outer()
            stored = self.writer.write_outer(outer, settings.embeddings)
            self.writer.write_tokenizer(source.tokenizer, source.companions())
            if self._float_inputs:
                return
            shape = (*self._tokens.shape, source.config.hidden_size)
            with self._context.files.write(STREAM, 0, shape) as out:
                write_embeddings(source.config, dequantize_tree(stored), self._tokens, out)

    def finalize(self) -> None:
        """Completes the checkpoint."""
        source = self._context.source
        self.writer.finalize(
            config=to_dict(self._context.settings),
            model_config=source.config,
            source_name=source.name,
            source_fingerprint=source.fingerprint,
        )

    def _mend(self) -> None:
        """Stores again, before hours of work, what was damaged of what `begin` stored."""
        source = self._context.source
        self.writer.write_tokenizer(source.tokenizer, source.companions())
        if not self.writer.has_outer():
            self.writer.write_outer(source.outer(), self._context.settings.embeddings)

    def visit(self, index: int, block: Params) -> None:
        """Writes the block last."""
        _, settings, workdir, progress, stopwatch = self._context
        packed, rows = block, []
        if index < self._last:
            packed, rows = _Block(self._context, self._plan, index, block).quantized(
                goes_on=index + 1 < self._last
            )
        else:
            progress.note(f"block {index} stays dense")
        with stopwatch.stage("save"):
            workdir.append_metrics(rows)
            self.writer.write_block(index, packed)


def num_quantized(settings: RunSettings, config: ModelConfig) -> int:
    """Blocks that are quantized; those after them stay dense."""
    depth = config.num_hidden_layers
    return min(settings.num_blocks or depth, depth)


def wants_middle(settings: RunSettings) -> bool:
    """Whether the float model's states inside the blocks are compared with."""
    return settings.calibration.asymmetry > 0


def wants_float(settings: RunSettings) -> bool:
    """Whether the float model's activations are read."""
    return wants_middle(settings) or settings.tune.block or settings.calibration.inputs == "float"


class _Block:
    """One block on its way from float to packed."""

    def __init__(self, context: Context, plan: Plan, index: int, block: Params):
        self._context, self._plan, self._index = context, plan, index
        self._float = self._dense = self._packed = block
        self._rows: list[dict[str, Any]] = []
        settings, files = context.settings, context.files
        c = settings.calibration
        self._config, self._files = context.source.config.of_block(index), files
        self._stream = forward.STREAM if c.inputs == "float" else STREAM
        self._weights = None
        if c.gradient_groups:
            loaded = context.workdir.load_token_weights(index)
            powers = c.gradient_power
            self._weights = {n: relative_weights(w, powers) for n, w in loaded.items()}
        self._reference = None
        if wants_middle(settings):
            self._reference = (
                files.read(forward.STREAM, index),
                files.read(forward.MIDDLE, index),
                files.read(forward.STREAM, index + 1),
            )

    def quantized(self, goes_on: bool) -> tuple[Params, list[dict[str, Any]]]:
        """The packed block and its metrics; what follows is calibrated if it `goes_on`."""
        settings = self._context.settings
        goes_on = goes_on and settings.calibration.inputs == "quantized"
        at = Files(self._files.read(self._stream, self._index), reference=self._reference)
        if settings.true_sequential:
            start, at = self._stage_by_stage(at)
        else:
            start = 0
            moments = None
            if self._stream == forward.STREAM:
                moments = load_moments(self._context.workdir, self._index)
            if moments is None:
                moments = self._run(at, 0, LAST - 1, self._moments(range(LAST)))
            self._quantize(LINEAR_LAYERS, moments)
        if settings.tune.block:
            _drop_inside(self._files)
            start, at = 0, Files(self._files.read(self._stream, self._index))
            self._tune()
        if goes_on:
            with self._files.write(STREAM, self._index + 1, at.x.shape) as out:
                self._run(at, start, LAST, Moments({}, {}), out)
        _drop_inside(self._files)
        return self._packed, self._rows

    def _stage_by_stage(self, at: Files) -> tuple[int, Files]:
        """Quantizes the layers of one stage after the other; where the last one starts from."""
        for stage, group in enumerate(LINEAR_GROUPS):
            opened = stage in (1, 3)
            out, shape = nullcontext(), None
            if stage:
                cols = get_layer(self._float, group[0])["kernel"].shape[0]
                name = _INNER if opened else _HALF
                shape = (*at.x.shape[:2], cols)
                out = self._files.pass_on(name, self._index, shape)
            with out as writer:
                start = max(0, stage - 1)
                moments = self._run(at, start, stage, self._moments([stage]), writer)
            if opened:
                at = at._replace(inner=self._files.read(_INNER, self._index))
            elif stage:
                at = at._replace(x=self._files.read(_HALF, self._index), inner=None)
            self._quantize(group, moments)
        return LAST - 1, at

    def _moments(self, stages: Sequence[int]) -> Moments:
        return init_moments(self._float, stages, self._weights, self._reference is not None)

    def _run(self, at: Files, start: int, stop: int, moments: Moments, out=None) -> Moments:
        with self._context.stopwatch.stage("hessians" if moments.inputs else "advance"):
            self._context.progress.note(f"block {self._index} {STAGES[min(stop, LAST - 1)]}")
            shape = at.x.shape
            stages = range(start, stop)
            self._context.stopwatch.flops(
                stage_flops(self._config, stages, *shape[:2])
                + moment_flops(moments, shape[0] * shape[1])
                + closing_outputs(self._config, crossed_stages(moments), *shape[:2])
            )
            moments = run_windows(
                self._config,
                self._dense,
                at,
                start,
                stop,
                moments,
                self._context.settings.calibration.batch_size,
                self._weights,
                out,
                self._float if moments.crosses else None,
            )
            return jax.block_until_ready(moments)

    def _quantize(self, names: Sequence[str], moments: Moments) -> None:
        """Puts packed layers, and dense ones as they will be, in place of the float ones."""
        progress = self._context.progress
        with self._context.stopwatch.stage("quantize"):
            start = time.perf_counter()
            problems = self._problems(names, moments)
            tensors = quantize_layers(problems)
            kernels = parallel(dequantize_compiled, tensors)
            rows = parallel(_row, list(zip(problems, tensors, kernels, strict=True)))
            self._context.stopwatch.flops(_flops(problems, moments))
            seconds = time.perf_counter() - start
        total = sum(problem.weight.size for problem in problems)
        for name, problem, tensor, kernel, row in zip(
            names, problems, tensors, kernels, rows, strict=True
        ):
            self._packed = with_layer(self._packed, name, tensor)
            self._dense = with_layer(self._dense, name, kernel.T)
            share = problem.weight.size / total  # they are quantized side by side
            where = {"kind": "layer", "block": self._index, "layer": name}
            self._rows.append({**where, **row, "seconds": seconds * share})
            progress.advance(f"block {self._index} {name}")

    def _problems(self, names: Sequence[str], moments: Moments) -> list[Problem]:
        settings = self._context.settings
        found = objectives(moments, settings.damping, f"layers_{self._index}")
        weights = {n: jnp.asarray(get_layer(self._float, n)["kernel"]).T for n in names}

        def problem(name: str) -> Problem:
            groups, of_layer = owners(name, self._weights), []
            for owner, rows in zip(groups, row_groups(weights[name], len(groups)), strict=True):
                objective = found[owner]
                if owner in moments.crosses:
                    shifted = shift(moments, owner, rows, objective.hessian)
                    objective = objective._replace(shift=shifted)
                of_layer.append(objective)
            key = jax.random.fold_in(jax.random.key(settings.seed), self._index)
            return Problem(
                METHODS[settings.method].quantize,
                self._plan.get((self._index, name), settings.method_settings),
                weights[name],
                of_layer,
                jax.random.fold_in(key, LINEAR_LAYERS.index(name)),
                settings.calibration.asymmetry,
                f"layers_{self._index}/{name}",
            )

        return [problem(name) for name in names]

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


def _drop_inside(files: StreamStore) -> None:
    """Forgets what stages have left inside a block."""
    for stream in (_HALF, _INNER):
        files.drop(stream)


def _flops(problems: Sequence[Problem], moments: Moments) -> float:
    """Of quantizing layers and measuring their errors."""
    return factor_flops(moments) + sum(
        most_flops(p) + 2 * flops.unit(*p.weight.shape) for p in problems
    )


def _row(of_layer: tuple[Problem, QuantizedTensor, jax.Array]) -> dict[str, Any]:
    """Metrics of a quantized layer."""
    problem, tensor, kernel = of_layer
    error = relative_error(problem.weight, kernel, problem.objectives)
    return {
        **code_metrics(tensor),
        "relative_error": error,
        "sqnr_db": float(metrics.sqnr_db(error)) if error > 0 else None,
        "bits_per_value": tensor.bits_per_value,
        "num_bytes": tensor.num_bytes,
        "num_values": problem.weight.size,
        "dead_inputs": int(jnp.sum(jnp.diagonal(problem.objectives[0].hessian) <= 0)),
        "damping": max(objective.factor.damping for objective in problem.objectives),
    }
