"""The streaming driver: quantizes a model one transformer block at a time.

For each block: load its weights, collect the Hessians of its layers on the calibration activations,
quantize the layers, tune the block where that is asked for, write it packed, advance the
activations, drop the block. Device memory holds one block, its Hessians and a batch; host memory
holds a block and the token embeddings, and the activations are on disk. Memory grows neither with
depth nor with the calibration tokens. A finished block is on disk before the next one starts.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.config import RunSettings, to_dict
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.core import metrics
from gptvq_jax.core.hessian import factorize
from gptvq_jax.core.vq_tensor import dequantize_compiled, unused_centroids
from gptvq_jax.methods.layer import Objective, quantize_layer, relative_error
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import (
    LINEAR_GROUPS,
    LINEAR_LAYERS,
    Params,
    get_layer,
    with_layer,
)
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.calibrate import Calibrated, Groups, Owner, calibrate, owners
from gptvq_jax.run.finetune import Pairs, tune_block
from gptvq_jax.run.sizes import stored_bytes
from gptvq_jax.run.streams import Streams
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.storage.checkpoint import CheckpointWriter, dequantize_block

Plan = Mapping[tuple[int, str], Any]  # (block, layer) -> settings of the method


class _Job(NamedTuple):
    """What stays the same from block to block."""

    source: ModelSource
    settings: RunSettings
    plan: Plan
    workdir: WorkDir
    streams: Streams
    progress: Progress
    stopwatch: Stopwatch


def steps(config: ModelConfig, settings: RunSettings) -> int:
    """By how much `quantize_model` advances the progress."""
    return sum(_block_steps(config, settings, i) for i in range(config.num_hidden_layers))


def _block_steps(config: ModelConfig, settings: RunSettings, index: int) -> int:
    tuned = settings.tune.block and index < _num_quantized(config, settings)
    return len(LINEAR_LAYERS) + tuned * settings.tune.epochs


def _num_quantized(config: ModelConfig, settings: RunSettings) -> int:
    depth = config.num_hidden_layers
    return min(settings.num_blocks or depth, depth)


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
      progress: advanced by one per linear layer and per epoch of tuning, `steps` in all.
      stopwatch: receives the seconds of every stage.

    Raises:
      FullDiskError: the disk lacks the room; said before anything is computed.
    """
    streams = Streams(source, settings, workdir)
    job = _Job(source, settings, plan, workdir, streams, progress, stopwatch)
    writer = CheckpointWriter(workdir.checkpoint, settings.dense_dtype)
    finished = writer.finished_blocks()
    depth = source.config.num_hidden_layers
    last = _num_quantized(source.config, settings)
    # Of a block that was killed or found damaged: it is made again.
    workdir.drop_activations(after=finished)
    if finished < depth:
        most = streams.peak_bytes(tokens.shape, finished, last)
        most += stored_bytes(source.config, settings, plan)
        workdir.check_room(most, "activations/*", "checkpoint/**/*")
    if finished == 0:
        with stopwatch.stage("embed"):
            _begin(job, writer, tokens)
    else:
        _mend(job, writer)
    rows = [row for row in workdir.metrics() if row["kind"] in ("layer", "block")]
    workdir.keep_metrics([row for row in rows if row["block"] < finished])
    progress.skip(sum(_block_steps(source.config, settings, i) for i in range(finished)))

    for index in range(finished, depth):
        with stopwatch.stage("load block"):
            block = source.block(index)
        rows = []
        if index < last:
            packed, dense, rows = _quantize_block(job, index, block, index + 1 < last)
            if settings.tune.block:
                del block, dense  # the tuning needs their room on the device
                with stopwatch.stage("tune"):
                    packed, row = _tune_block(job, index, packed)
                    dense = dequantize_block(packed)
                rows.append(row)
        else:
            packed = block
            progress.advance(f"block {index} stays dense", len(LINEAR_LAYERS))
        if index + 1 < last:  # beyond it, nothing is calibrated any more
            with stopwatch.stage("advance"):
                streams.advance(index, dense)
        with stopwatch.stage("save"):
            workdir.append_metrics(rows)
            writer.write_block(index, packed)
            workdir.drop_activations(before=index)  # its own stay, for the case that it is damaged
    writer.finalize(
        config=to_dict(settings),
        model_config=source.config,
        source_name=source.name,
        source_fingerprint=source.fingerprint,
    )
    workdir.drop_activations(before=depth + 1)


def _begin(job: _Job, writer: CheckpointWriter, tokens: np.ndarray) -> None:
    """Stores what is outside the blocks, and embeds the tokens."""
    outer = job.source.outer()
    stored = writer.write_outer(outer, job.settings.embeddings)
    writer.write_tokenizer(job.source.tokenizer, job.source.companions())
    job.streams.begin(outer, stored, tokens)


def _mend(job: _Job, writer: CheckpointWriter) -> None:
    """Stores again, before hours of work, what was damaged of what `_begin` stored."""
    writer.write_tokenizer(job.source.tokenizer, job.source.companions())
    if not writer.has_outer():
        writer.write_outer(job.source.outer(), job.settings.embeddings)


def _quantize_block(
    job: _Job, index: int, block: Params, goes_on: bool
) -> tuple[Params, Params, list[dict]]:
    """Returns the block with packed and with dequantized kernels, and metric rows.

    The outputs of the float block are written on the way, if the next block `goes_on` with them or
    this one is tuned towards them.
    """
    settings, c, streams = job.settings, job.settings.calibration, job.streams
    weights = job.workdir.load_token_weights(index) if c.gradient_groups else None
    inputs, float_inputs = streams.quantized(index), streams.float(index)
    reference = None if float_inputs is None else (block, float_inputs)
    wants_outputs = goes_on or settings.tune.block
    packed = dense = block
    rows = []
    passes = [[group] for group in LINEAR_GROUPS] if settings.true_sequential else [LINEAR_GROUPS]
    for groups in passes:
        first = groups is passes[0]  # where all layers are float still
        outputs = streams.float_outputs(index) if first and wants_outputs else nullcontext()
        with job.stopwatch.stage("hessians"), outputs as out:
            job.progress.note(f"block {index} Hessians")
            seen = calibrate(
                job.source.config,
                dense,
                inputs,
                groups,
                c.batch_size,
                weights=weights,
                power=c.gradient_power,
                reference=reference,
                want_crosses=c.asymmetry > 0,
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


def _tune_block(job: _Job, index: int, packed: Params) -> tuple[Params, dict]:
    """The block with what is continuous in it tuned, and its row of metrics."""
    start = time.perf_counter()
    settings, targets = job.settings, job.streams.float(index + 1)
    packed, row = tune_block(
        job.source.config,
        packed,
        Pairs(job.streams.quantized(index), targets),
        settings.tune,
        dense_dtype=settings.dense_dtype,
        order=np.random.default_rng([settings.seed, index]),
        name=f"layers_{index}",
        on_epoch=job.progress.advance,
    )
    job.progress.advance(steps=settings.tune.epochs - row["epochs"])
    seconds = time.perf_counter() - start
    return packed, {"kind": "block", "block": index, **row, "seconds": seconds}


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
        f"layers_{index}/{name}",
    )
    quantized = dequantize_compiled(tensor)
    error = relative_error(weight, quantized, objectives)
    row = {
        "kind": "layer",
        "block": index,
        "layer": name,
        "num_codebooks": len(tensor.codes),
        "dim": tensor.grid.dim,
        "index_bits": tensor.index_bits,
        "relative_error": error,
        "sqnr_db": float(metrics.sqnr_db(error)) if error > 0 else None,
        "bits_per_value": tensor.bits_per_value,
        "num_bytes": tensor.num_bytes,
        "num_values": weight.size,
        "unused_centroids": int(unused_centroids(tensor)),
        "dead_inputs": int(jnp.sum(jnp.diagonal(objectives[0].hessian) <= 0)),
        "damping": max(objective.factor.damping for objective in objectives),
        "seconds": time.perf_counter() - start,
    }
    return tensor, quantized.T, row
