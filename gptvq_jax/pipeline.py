"""The streaming driver: quantizes a model one transformer block at a time.

For each block: load its weights, collect the Hessians of its layers on the calibration activations,
quantize the layers, write the packed block, advance the activations, drop the block. Device memory
holds one block, its Hessians and a batch; host memory holds the activations (bfloat16) and one
block. Neither grows with depth. A finished block is on disk before the next one starts.
"""

import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptvq_jax import metrics
from gptvq_jax.calibrate import advance, calibrate
from gptvq_jax.checkpoint import CheckpointWriter
from gptvq_jax.config import RunSettings, to_dict
from gptvq_jax.hessian import Factor, asymmetric_target, factorize, zero_dead
from gptvq_jax.methods import METHODS
from gptvq_jax.models.config import ModelConfig
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
from gptvq_jax.vq_tensor import dequantize
from gptvq_jax.workdir import WorkDir

_dequantize = jax.jit(dequantize)


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
    asymmetric = settings.calibration.asymmetry > 0
    activations = float_activations = None
    if finished == 0:
        with stopwatch.stage("embed"):
            outer = source.outer()
            writer.write_outer(outer)
            writer.write_tokenizer(source.tokenizer)
            table = outer["embed_tokens"]["embedding"].astype(ml_dtypes.bfloat16)
            activations = table[tokens]
            workdir.save_activations(0, activations)
            if asymmetric:
                float_activations = activations
                workdir.save_activations(0, float_activations, "float")
            del outer, table
    elif finished < last:
        activations = workdir.load_activations(finished)
        if asymmetric:
            float_activations = workdir.load_activations(finished, "float")
    kept = [row for row in workdir.metrics() if row["kind"] == "layer" and row["block"] < finished]
    workdir.keep_metrics(kept)
    progress.skip(finished * len(LINEAR_LAYERS))

    for index in range(finished, depth):
        with stopwatch.stage("load block"):
            block = jax.device_put(source.block(index))
        rows = []
        if index < last:
            packed, dense, rows, outputs = _quantize_block(
                source.config,
                block,
                activations,
                float_activations,
                settings,
                index,
                progress,
                stopwatch,
            )
        else:
            packed, dense, outputs = block, block, None
            progress.advance(f"block {index} stays dense", len(LINEAR_LAYERS))
        if index + 1 < last:  # beyond it, nothing is calibrated any more
            with stopwatch.stage("advance"):
                if asymmetric:
                    float_activations = outputs
                    workdir.save_activations(index + 1, float_activations, "float")
                if settings.calibration.inputs == "float":
                    activations = outputs
                else:
                    batch_size = settings.calibration.batch_size
                    activations = advance(source.config, dense, activations, batch_size)
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
    )


def _quantize_block(
    config: ModelConfig,
    block: Params,
    activations: np.ndarray,
    float_activations: np.ndarray | None,
    settings: RunSettings,
    index: int,
    progress: Progress,
    stopwatch: Stopwatch,
) -> tuple[Params, Params, list[dict], np.ndarray | None]:
    """Returns the block with packed and with dequantized kernels, metric rows, float outputs."""
    packed = dense = block
    rows, outputs = [], None
    strength = settings.calibration.asymmetry
    reference = (block, float_activations) if strength > 0 else None
    wants_outputs = reference is not None or settings.calibration.inputs == "float"
    passes = [[group] for group in LINEAR_GROUPS] if settings.true_sequential else [LINEAR_GROUPS]
    for groups in passes:
        first = groups is passes[0]  # where all layers are float still
        with stopwatch.stage("hessians"):
            progress.note(f"block {index} Hessians")
            seen = calibrate(
                config,
                dense,
                activations,
                groups,
                settings.calibration.batch_size,
                reference=reference,
                keep_output=wants_outputs and first,
            )
            outputs = seen.outputs if first else outputs
        for group in groups:
            with stopwatch.stage("factorize"):
                hessian = seen.hessians.pop(group[0])
                factor = factorize(hessian, settings.damping, f"layers_{index}/{group[0]}")
            for name in group:
                with stopwatch.stage("quantize"):
                    weight = jnp.asarray(get_layer(block, name)["kernel"]).T
                    target = weight
                    if reference is not None:
                        cross = seen.crosses[group[0]]
                        u = factor.hinv_chol
                        target = asymmetric_target(weight, hessian, cross, u, strength)
                    tensor, kernel, row = _quantize_layer(
                        weight, target, hessian, factor, settings, index, name
                    )
                packed = with_layer(packed, name, tensor)
                dense = with_layer(dense, name, kernel)
                rows.append(row)
                progress.advance(f"block {index} {name}")
    return packed, dense, rows, outputs


def _quantize_layer(weight, target, hessian, factor: Factor, settings: RunSettings, index, name):
    """One linear layer: the packed tensor, its dense kernel (in, out), its row of metrics."""
    start = time.perf_counter()
    method = METHODS[settings.method]
    key = jax.random.fold_in(jax.random.key(settings.seed), index)
    key = jax.random.fold_in(key, LINEAR_LAYERS.index(name))
    tensor = method.quantize(
        zero_dead(target, hessian), hessian, factor.hinv_chol, key, settings.method_settings
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
        "damping": factor.damping,
        "seconds": time.perf_counter() - start,
    }
    return tensor, quantized.T, row
