"""The streaming driver: quantizes a model one transformer block at a time.

For each block: load its weights, collect the Hessians of its layers on the calibration activations,
quantize the layers, write the packed block, advance the activations, drop the block. Device memory
holds one block, its Hessians and a batch; host memory holds a block and the token embeddings, and
the activations are on disk. Memory grows neither with depth nor with the calibration tokens. A
finished block is on disk before the next one starts.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax import metrics
from gptvq_jax.activations import Activations
from gptvq_jax.calibrate import Calibrated, Groups, Owner, advance, calibrate, embed_tokens, owners
from gptvq_jax.checkpoint import CheckpointWriter, dequantize_tree
from gptvq_jax.config import RunSettings, to_dict
from gptvq_jax.hessian import factorize
from gptvq_jax.layer import Objective, quantize_layer, relative_error
from gptvq_jax.methods import METHODS
from gptvq_jax.models.llama import (
    LINEAR_GROUPS,
    LINEAR_LAYERS,
    Params,
    get_layer,
    with_layer,
)
from gptvq_jax.models.source import ModelSource
from gptvq_jax.progress import Progress
from gptvq_jax.stopwatch import Stopwatch
from gptvq_jax.vq_tensor import dequantize_compiled
from gptvq_jax.workdir import WorkDir

Plan = Mapping[tuple[int, str], Any]  # (block, layer) -> settings of the method


class Streams(NamedTuple):
    """Calibration activations at the entrance of a block, (n, T, hidden)."""

    quantized: Activations  # in the model as far as it is quantized
    float: Activations | None  # in the float model, where the target is asymmetric


class _Job(NamedTuple):
    """What stays the same from block to block."""

    source: ModelSource
    settings: RunSettings
    plan: Plan
    workdir: WorkDir
    progress: Progress
    stopwatch: Stopwatch


def quantize_model(
    source: ModelSource,
    settings: RunSettings,
    plan: Plan,
    workdir: WorkDir,
    tokens: np.ndarray,
    progress: Progress,
    stopwatch: Stopwatch,
) -> None:
    """Quantizes all linear layers and writes the packed checkpoint, resuming where it can.

    Args:
      source: the float model.
      settings: of the run.
      plan: settings of layers that differ from `settings.method_settings`.
      workdir: opened with these settings; holds the token weights if there are any.
      tokens: calibration windows (n, T).
      progress: advanced by one per linear layer.
      stopwatch: receives the seconds of every stage.
    """
    job = _Job(source, settings, plan, workdir, progress, stopwatch)
    writer = CheckpointWriter(workdir.checkpoint, settings.dense_dtype)
    finished = writer.finished_blocks()
    depth = source.config.num_hidden_layers
    last = min(settings.num_blocks or depth, depth)
    streams = _load_streams(job, writer, tokens, finished) if finished < last else None
    kept = [row for row in workdir.metrics() if row["kind"] == "layer" and row["block"] < finished]
    workdir.keep_metrics(kept)
    progress.skip(finished * len(LINEAR_LAYERS))

    for index in range(finished, depth):
        with stopwatch.stage("load block"):
            block = jax.device_put(source.block(index))
        rows = []
        if index < last:
            packed, dense, rows = _quantize_block(job, index, block, streams, index + 1 < last)
        else:
            packed = block
            progress.advance(f"block {index} stays dense", len(LINEAR_LAYERS))
        if index + 1 < last:  # beyond it, nothing is calibrated any more
            with stopwatch.stage("advance"):
                streams = _advance(job, index, dense, streams)
        with stopwatch.stage("save"):
            workdir.append_metrics(rows)
            writer.write_block(index, packed)
            workdir.drop_activations(before=index + 1)
    writer.finalize(
        config=to_dict(settings),
        model_config=source.config,
        source_name=source.name,
        source_fingerprint=source.fingerprint,
    )


def _load_streams(
    job: _Job, writer: CheckpointWriter, tokens: np.ndarray, finished: int
) -> Streams:
    """Activations at the entrance of the first block that is not finished."""
    if finished == 0:
        with job.stopwatch.stage("embed"):
            c, outer = job.settings.calibration, job.source.outer()
            stored = writer.write_outer(outer, job.settings.embeddings)
            writer.write_tokenizer(job.source.tokenizer)
            shape = (*tokens.shape, job.source.config.hidden_size)
            if c.asymmetry > 0:
                with job.workdir.write_activations(0, shape, "float") as out:
                    embed_tokens(outer, tokens, out)
            stored = outer if c.inputs == "float" else dequantize_tree(stored)
            with job.workdir.write_activations(0, shape) as out:
                embed_tokens(stored, tokens, out)
    return _streams(job, finished)


def _streams(job: _Job, index: int) -> Streams:
    load = job.workdir.load_activations
    asymmetric = job.settings.calibration.asymmetry > 0
    return Streams(load(index), load(index, "float") if asymmetric else None)


def _advance(job: _Job, index: int, block: Params, streams: Streams) -> Streams:
    """Activations at the exit of a block, given quantized."""
    c, shape = job.settings.calibration, streams.quantized.shape
    if c.inputs == "quantized":
        with job.workdir.write_activations(index + 1, shape) as out:
            advance(job.source.config, block, streams.quantized, c.batch_size, out)
    return _streams(job, index + 1)


def _float_outputs(job: _Job, index: int, streams: Streams):
    """Where the outputs of the float block go, if another block needs them."""
    if streams.float is None and job.settings.calibration.inputs == "quantized":
        return nullcontext()
    stream = "quantized" if streams.float is None else "float"
    return job.workdir.write_activations(index + 1, streams.quantized.shape, stream)


def _quantize_block(
    job: _Job, index: int, block: Params, streams: Streams, goes_on: bool
) -> tuple[Params, Params, list[dict]]:
    """Returns the block with packed and with dequantized kernels, and metric rows.

    The outputs of the float block are written on the way, if the next block `goes_on` with them.
    """
    settings, c = job.settings, job.settings.calibration
    weights = job.workdir.load_token_weights(index) if c.gradient_groups else None
    reference = None if streams.float is None else (block, streams.float)
    packed = dense = block
    rows = []
    passes = [[group] for group in LINEAR_GROUPS] if settings.true_sequential else [LINEAR_GROUPS]
    for groups in passes:
        first = groups is passes[0]  # where all layers are float still
        outputs = _float_outputs(job, index, streams) if first and goes_on else nullcontext()
        with job.stopwatch.stage("hessians"), outputs as out:
            job.progress.note(f"block {index} Hessians")
            seen = calibrate(
                job.source.config,
                dense,
                streams.quantized,
                groups,
                c.batch_size,
                weights=weights,
                power=c.gradient_power,
                reference=reference,
                out=out,
            )
        for name, objectives in objectives_of(seen, groups, weights, settings.damping, index):
            with job.stopwatch.stage("quantize"):
                weight = jnp.asarray(get_layer(block, name)["kernel"]).T
                tensor, kernel, row = _quantize_layer(job, index, name, weight, objectives)
            packed = with_layer(packed, name, tensor)
            dense = with_layer(dense, name, kernel)
            rows.append(row)
            job.progress.advance(f"block {index} {name}")
    return packed, dense, rows


def objectives_of(
    seen: Calibrated,
    groups: Groups,
    weights: Mapping[str, np.ndarray] | None,
    damping: float,
    index: int,
) -> Iterator[tuple[str, list[Objective]]]:
    """Layers and their objectives; a Hessian is factorized once and dropped after its last layer.

    Args:
      seen: statistics of the block, which are taken out.
      groups: layers that share one input.
      weights: of the tokens, as given to `calibrate`.
      damping: fraction of the mean diagonal.
      index: of the block, for messages.
    """
    for group in groups:
        made: dict[Owner, Objective] = {}
        for name in group:
            wanted = owners(name, weights)
            made = {owner: o for owner, o in made.items() if owner in wanted}
            for owner in wanted:
                if owner not in made:
                    hessian = seen.hessians.pop(owner)
                    factor = factorize(hessian, damping, f"layers_{index}/{name}")
                    made[owner] = Objective(hessian, factor, seen.crosses.pop(owner, None))
            yield name, [made[owner] for owner in wanted]


def _quantize_layer(job: _Job, index: int, name: str, weight: jax.Array, objectives):
    """One linear layer: the packed tensor, its dense kernel (in, out), its row of metrics."""
    start = time.perf_counter()
    settings = job.settings
    key = jax.random.fold_in(jax.random.key(settings.seed), index)
    key = jax.random.fold_in(key, LINEAR_LAYERS.index(name))
    tensor = quantize_layer(
        METHODS[settings.method].quantize,
        job.plan.get((index, name), settings.method_settings),
        weight,
        objectives,
        key,
        settings.calibration.asymmetry,
    )
    quantized = dequantize_compiled(tensor)
    error = relative_error(weight, quantized, objectives)
    if not np.isfinite(error):
        raise ValueError(
            f"layers_{index}/{name}: the quantized weight is not finite; raise config.damping"
        )
    row = {
        "kind": "layer",
        "block": index,
        "layer": name,
        "dim": tensor.grid.dim,
        "index_bits": tensor.index_bits,
        "relative_error": error,
        "sqnr_db": float(metrics.sqnr_db(error)) if error > 0 else None,
        "bits_per_value": tensor.bits_per_value,
        "num_bytes": tensor.num_bytes,
        "num_values": weight.size,
        "dead_inputs": int(jnp.sum(jnp.diagonal(objectives[0].hessian) <= 0)),
        "damping": max(objective.factor.damping for objective in objectives),
        "seconds": time.perf_counter() - start,
    }
    return tensor, quantized.T, row
