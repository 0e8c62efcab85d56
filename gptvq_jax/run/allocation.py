"""Index bits and dimension for each layer, under a budget for the whole model.

Every layer is quantized with every candidate, and what the model's loss would rise by is estimated
from its output error. With w_t the mean squared gradient of the loss with respect to the outputs of
a row group at token t, it is to second order and up to a constant factor

    rise = sum over row groups of (mean_t w_t) tr((W - Q) H (W - Q)^T)

where H is the Hessian that the layer is quantized with, weighted by gradients or not.
That makes layers comparable, and adds up over them: the best allocation is a knapsack, solved
exactly (knapsack.py). The curves are measured on the float model, a block at a time, without
polish.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from gptvq_jax.config import RunSettings
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.core import knapsack
from gptvq_jax.core.vq_tensor import dequantize_compiled
from gptvq_jax.methods.layer import losses, quantize_layer
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import LINEAR_GROUPS, LINEAR_LAYERS, get_layer
from gptvq_jax.models.source import ModelSource, layer_shapes
from gptvq_jax.run.activations import num_bytes
from gptvq_jax.run.calibrate import calibrate
from gptvq_jax.run.embedding import write_embeddings
from gptvq_jax.run.quantize import Plan, objectives_of
from gptvq_jax.run.sizes import packed_bytes
from gptvq_jax.run.workdir import WorkDir

_ROW_BYTES = 160  # of one candidate in a file of curves, at most
_STREAM = "curves"  # activations of the float model, of which a resumed measurement needs the last


def steps(num_blocks: int) -> int:
    """By how much `measure_curves` advances the progress."""
    return num_blocks * len(LINEAR_LAYERS)


def check_budget(config: ModelConfig, settings: RunSettings) -> None:
    """Checks, before any work, that the smallest candidates are within the budget.

    Says so where the largest ones leave some of it: every layer gets these, whatever the budget.

    Raises:
      ValueError: they are not; the message names the bits per value that they take.
    """
    groups = settings.calibration.gradient_groups or 1
    fewest, most, values = 0, 0, 0
    for rows, cols in layer_shapes(config).values():
        sizes = [
            packed_bytes(settings.method, candidate, rows, cols, groups)
            for candidate in settings.candidates
        ]
        fewest += min(sizes)
        most += max(sizes)
        values += rows * cols
    if 8 * fewest > settings.allocation.bits_per_value * values:
        raise ValueError(
            f"allocation.bits_per_value={settings.allocation.bits_per_value:g} cannot be met: the "
            f"smallest candidates take {8 * fewest / values:.4f} bits per value; raise it, or add "
            "smaller ones to allocation.bits"
        )
    if 8 * most < settings.allocation.bits_per_value * values:
        logging.warning(
            "allocation.bits_per_value=%g is not used up: the largest candidates take %.4f bits "
            "per value, so every layer gets its best one; add larger ones to allocation.bits",
            settings.allocation.bits_per_value,
            8 * most / values,
        )


def peak_bytes(config: ModelConfig, shape: tuple[int, int], num_blocks: int, num_rows: int) -> int:
    """Most bytes that `measure_curves` has on the disk at once, in the files that it makes.

    Args:
      config: of the model.
      shape: of the tokens (n, T).
      num_blocks: blocks to measure.
      num_rows: candidates of a layer.
    """
    curves = num_blocks * len(LINEAR_LAYERS) * num_rows * _ROW_BYTES
    return 2 * num_bytes((*shape, config.hidden_size)) + curves


def measure_curves(
    source: ModelSource,
    settings: RunSettings,
    workdir: WorkDir,
    tokens: np.ndarray,
    num_blocks: int,
    progress: Progress,
    stopwatch: Stopwatch,
) -> None:
    """Writes the error curves of every layer to the work directory, resuming where it can.

    Args:
      source: the float model.
      settings: of the run, with candidates.
      workdir: opened with these settings; holds the token weights.
      tokens: calibration windows (n, T).
      num_blocks: blocks to measure.
      progress: advanced by one per layer, `steps` in all.
      stopwatch: receives the seconds as stage "allocation".
    """
    with stopwatch.stage("allocation"):
        done = next((i for i in range(num_blocks) if not workdir.has_curves(i)), num_blocks)
        workdir.drop_activations(stream=_STREAM, after=done)
        if done < num_blocks:
            most = peak_bytes(source.config, tokens.shape, num_blocks, len(settings.candidates))
            workdir.check_room(most, f"activations/*.{_STREAM}.npy", "curves/*")
        progress.skip(done * len(LINEAR_LAYERS))
        if done == 0:
            shape = (*tokens.shape, source.config.hidden_size)
            with workdir.write_activations(0, shape, _STREAM) as out:
                write_embeddings(source.outer(), tokens, out)
        for index in range(done, num_blocks):
            x = workdir.load_activations(index, _STREAM)
            with workdir.write_activations(index + 1, x.shape, _STREAM) as out:
                rows = _block_curves(source, settings, workdir, index, x, out, progress)
            workdir.save_curves(index, rows)
            workdir.drop_activations(before=index + 1, stream=_STREAM)
        workdir.drop_activations(before=num_blocks + 1, stream=_STREAM)


def _block_curves(source, settings, workdir, index, x, out, progress) -> list[dict[str, Any]]:
    """One row for every layer and candidate; `out` receives the outputs of the float block."""
    block = source.block(index)
    gradients = workdir.load_token_weights(index)
    weights = gradients if settings.calibration.gradient_groups else None
    progress.note(f"block {index} Hessians")
    seen = calibrate(
        source.config,
        block,
        x,
        LINEAR_GROUPS,
        settings.calibration.batch_size,
        weights=weights,
        power=settings.calibration.gradient_power,
        out=out,
    )
    rows = []
    for name, objectives in objectives_of(seen, LINEAR_GROUPS, weights, settings.damping, index):
        weight = jnp.asarray(get_layer(block, name)["kernel"]).T
        sensitivity = gradients[name].mean(axis=(0, 1), dtype=np.float64)
        for candidate in settings.candidates:
            quick = dataclasses.replace(
                candidate, em_iterations=settings.allocation.em_iterations, polish_rounds=0
            )
            tensor = quantize_layer(
                METHODS[settings.method].quantize,
                quick,
                weight,
                objectives,
                jax.random.key(settings.seed),
                name=f"layers_{index}/{name}",
            )
            parts = losses(weight, dequantize_compiled(tensor), objectives)
            loss = float(np.dot(sensitivity, parts))
            rows.append({
                "layer": name,
                "dim": candidate.dim,
                "bits": candidate.bits,
                "loss": loss,
                "num_bytes": tensor.num_bytes,
                "num_values": weight.size,
            })  # fmt: skip
        progress.advance(f"block {index} {name}")
    return rows


def plan(settings: RunSettings, workdir: WorkDir, num_blocks: int) -> Plan:
    """Settings for every layer of the measured blocks: the least estimated rise of the loss."""
    curves: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for index in range(num_blocks):
        for row in workdir.load_curves(index):
            curves.setdefault((index, row["layer"]), []).append(row)
    values = sum(rows[0]["num_values"] for rows in curves.values())
    chosen = knapsack.choose(
        [[row["loss"] for row in rows] for rows in curves.values()],
        [[row["num_bytes"] for row in rows] for rows in curves.values()],
        int(settings.allocation.bits_per_value * values / 8),
    )
    return {layer: settings.candidates[k] for layer, k in zip(curves, chosen, strict=True)}
