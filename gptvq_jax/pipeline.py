"""The streaming driver: quantizes a model one transformer block at a time.

For each block: load its weights, collect the Hessians of its layers on the calibration activations,
quantize the layers, write the packed block, advance the activations, drop the block. Device memory
holds one block, its Hessians and a batch; host memory holds the activations (bfloat16) and one
block. Neither grows with depth. A finished block is on disk before the next one starts.
"""

import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptvq_jax import metrics
from gptvq_jax.checkpoint import CheckpointWriter
from gptvq_jax.config import RunSettings, to_dict
from gptvq_jax.hessian import Moment, add_inputs, factorize, init_moment, mean, zero_dead
from gptvq_jax.methods import METHODS
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import (
    LINEAR_GROUPS,
    LINEAR_LAYERS,
    Params,
    block_forward,
    block_forward_with_inputs,
    get_layer,
    with_layer,
)
from gptvq_jax.models.source import ModelSource
from gptvq_jax.progress import Progress
from gptvq_jax.stopwatch import Stopwatch
from gptvq_jax.vq_tensor import dequantize
from gptvq_jax.workdir import WorkDir

_dequantize = jax.jit(dequantize)


@partial(jax.jit, static_argnames=("config", "keep_output"), donate_argnames="moments")
def accumulate(
    config: ModelConfig,
    block: Params,
    x: jax.Array,
    moments: dict[str, Moment],
    keep_output: bool = False,
) -> tuple[jax.Array | None, dict[str, Moment]]:
    """Adds one batch of block inputs x (batch, T, hidden) to the moments of the groups named.

    What neither the moments nor the output need is not computed.
    """
    y, inputs = block_forward_with_inputs(config, block, x)
    moments = {name: add_inputs(moment, inputs[name]) for name, moment in moments.items()}
    return (y if keep_output else None), moments


def quantize_model(
    source: ModelSource,
    settings: RunSettings,
    workdir: WorkDir,
    tokens: np.ndarray,
    progress: Progress,
    stopwatch: Stopwatch,
) -> None:
    """Quantizes all linear layers and writes the packed checkpoint, resuming where it can.

    Args:
      source: the float model.
      settings: of the run.
      workdir: opened with these settings.
      tokens: calibration windows (n, T).
      progress: advanced by one per linear layer.
      stopwatch: receives the seconds of every stage.
    """
    writer = CheckpointWriter(workdir.checkpoint, settings.dense_dtype)
    finished = writer.finished_blocks()
    depth = source.config.num_hidden_layers
    last = min(settings.num_blocks or depth, depth)
    activations = None
    if finished == 0:
        with stopwatch.stage("embed"):
            outer = source.outer()
            writer.write_outer(outer)
            writer.write_tokenizer(source.tokenizer)
            table = outer["embed_tokens"]["embedding"].astype(ml_dtypes.bfloat16)
            activations = table[tokens]
            workdir.save_activations(0, activations)
            del outer, table
    elif finished < last:
        activations = workdir.load_activations(finished)
    kept = [row for row in workdir.metrics() if row["kind"] == "layer" and row["block"] < finished]
    workdir.keep_metrics(kept)
    progress.skip(finished * len(LINEAR_LAYERS))

    for index in range(finished, depth):
        with stopwatch.stage("load block"):
            block = jax.device_put(source.block(index))
        rows = []
        if index < last:
            packed, dense, rows, outputs = _quantize_block(
                source.config, block, activations, settings, index, progress, stopwatch
            )
        else:
            packed, dense, outputs = block, block, None
            progress.advance(f"block {index} stays dense", len(LINEAR_LAYERS))
        if index + 1 < last:  # beyond it, nothing is calibrated any more
            with stopwatch.stage("advance"):
                if outputs is None:
                    outputs = _advance(source.config, dense, activations, settings)
                activations = outputs
                workdir.save_activations(index + 1, activations)
        with stopwatch.stage("save"):
            workdir.append_metrics(rows)
            writer.write_block(index, packed)
            workdir.drop_activations(before=index + 1)
    writer.finalize(
        config=to_dict(settings),
        model_config=source.config,
        source_name=source.name,
        source_fingerprint=source.fingerprint,
        summary={},
    )


def _quantize_block(
    config: ModelConfig,
    block: Params,
    activations: np.ndarray,
    settings: RunSettings,
    index: int,
    progress: Progress,
    stopwatch: Stopwatch,
) -> tuple[Params, Params, list[dict], np.ndarray | None]:
    """Returns the block with packed and with dequantized kernels, metric rows, float outputs."""
    packed = dense = block
    rows, outputs = [], None
    keep_output = settings.calibration.inputs == "float"
    passes = [[group] for group in LINEAR_GROUPS] if settings.true_sequential else [LINEAR_GROUPS]
    for number, groups in enumerate(passes):
        with stopwatch.stage("hessians"):
            progress.note(f"block {index} Hessians")
            keep = keep_output and number == 0  # only in the first pass are all layers float
            hessians, y = _collect(config, dense, activations, groups, settings, keep)
            outputs = y if keep else outputs
        for group in groups:
            with stopwatch.stage("factorize"):
                hessian = hessians.pop(group[0])
                factor = factorize(hessian, settings.damping, f"layers_{index}/{group[0]}")
            for name in group:
                with stopwatch.stage("quantize"):
                    weight = jnp.asarray(get_layer(block, name)["kernel"]).T
                    tensor, kernel, row = _quantize_layer(
                        weight, hessian, factor.hinv_chol, settings, index, name
                    )
                packed = with_layer(packed, name, tensor)
                dense = with_layer(dense, name, kernel)
                rows.append({**row, "damping": factor.damping})
                progress.advance(f"block {index} {name}")
    return packed, dense, rows, outputs


def _quantize_layer(weight, hessian, hinv_chol, settings: RunSettings, index: int, name: str):
    """One linear layer: the packed tensor, its dense kernel (in, out), its row of metrics."""
    start = time.perf_counter()
    method = METHODS[settings.method]
    key = jax.random.fold_in(jax.random.key(settings.seed), index)
    key = jax.random.fold_in(key, LINEAR_LAYERS.index(name))
    tensor = method.quantize(
        zero_dead(weight, hessian), hessian, hinv_chol, key, settings.method_settings
    )
    quantized = _dequantize(tensor)
    error = float(metrics.relative_error(weight, quantized, hessian))
    if not np.isfinite(error):
        raise ValueError(
            f"layers_{index}/{name}: the quantized weight is not finite; raise config.damping"
        )
    row = {
        "kind": "layer",
        "block": index,
        "layer": name,
        "relative_error": error,
        "sqnr_db": float(metrics.sqnr_db(error)) if error > 0 else None,
        "bits_per_value": tensor.bits_per_value,
        "num_bytes": tensor.num_bytes,
        "num_values": weight.size,
        "dead_inputs": int(jnp.sum(jnp.diagonal(hessian) <= 0)),
        "seconds": time.perf_counter() - start,
    }
    return tensor, quantized.T, row


def _collect(config, block, activations, groups, settings, keep_output):
    """Hessians {group[0]: (C, C)} over all calibration windows, and the outputs if asked for."""
    moments = {group[0]: init_moment(_inputs_of(block, group[0])) for group in groups}
    outputs = np.empty_like(activations) if keep_output else None
    for part in _batches(len(activations), settings.calibration.batch_size):
        x = jnp.asarray(activations[part], jnp.float32)
        y, moments = accumulate(config, block, x, moments, keep_output=keep_output)
        if keep_output:
            outputs[part] = np.asarray(y.astype(jnp.bfloat16))
    hessians = {name: mean(moment) for name, moment in moments.items()}
    return jax.block_until_ready(hessians), outputs


def _advance(config, block, activations, settings) -> np.ndarray:
    outputs = np.empty_like(activations)
    for part in _batches(len(activations), settings.calibration.batch_size):
        y = block_forward(config, block, jnp.asarray(activations[part], jnp.float32))
        outputs[part] = np.asarray(y.astype(jnp.bfloat16))
    return outputs


def _inputs_of(block: Params, name: str) -> int:
    return get_layer(block, name)["kernel"].shape[0]


def _batches(count: int, batch_size: int) -> Iterator[slice]:
    """Slices of equal size, so that one compiled step serves them all."""
    size = next(s for s in range(min(batch_size, count), 0, -1) if count % s == 0)
    return (slice(start, start + size) for start in range(0, count, size))
