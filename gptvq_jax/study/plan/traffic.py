"""Bytes of activations that stages read and write, and kernels that quantizing launches."""

from typing import Any, NamedTuple

from gptvq_jax.config import RunSettings
from gptvq_jax.core.products import FLOAT32
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.shapes import opened_width
from gptvq_jax.ops.gpu import columns
from gptvq_jax.run.calibrate import opens_again
from gptvq_jax.run.formats import layer_format, linear_layers, num_quantized
from gptvq_jax.run.forward import wants_float, wants_middle
from gptvq_jax.run.work import used_settings

# Kernels in XLA's programs for an H100, counted by tests/ops/test_compile_gpu.py for a layer of
# 8192 x 28672 in 2D with 16 centroids, and in 4D with 256. By the kernel for a block of columns, a
# sweep and a recode launch 5 for each block, and a sweep 6 more for each strip.
OF_A_BLOCK, OF_A_STRIP = 5.0, 6.0
# Of k-means++ for each centroid of a strip; of a step of EM of a strip, which grows with the groups
# of 16 centroids that a search goes through.
OF_A_SEED, OF_A_STEP = 15.5, (50.2, 1.67)
_CHUNK = 16
# Of a sweep or recode that takes no kernel, for each vector: an estimate, from programs in which
# vectors, seeds and steps were not counted apart.
OF_A_VECTOR = 14.0, 2.53


class Traffic(NamedTuple):
    """Bytes of files that a stage reads and writes, as the stopwatch counts them."""

    moved: int
    awaited: int  # of them: written, and waited for until the disk has them


def stage_bytes(
    config: ModelConfig,
    settings: RunSettings,
    evaluated: int | None = None,
    platform: str | None = None,
) -> dict[str, Traffic]:
    """Of each stage that has any.

    Args:
      config: of the model.
      settings: of the run.
      evaluated: windows of the held-out text, where the settings take all of a text.
      platform: of `calibrate.opens_again`.
    """
    c, e, hidden = settings.calibration, settings.evaluation, config.hidden_size
    depth, last = config.num_hidden_layers, num_quantized(settings, config)
    stream, middle = 2 * c.all_windows * c.seqlen * hidden, wants_middle(settings)
    stages = "forward", "gradients", "hessians", "advance", "evaluate"
    found, awaited = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    if settings.weight_groups or wants_float(settings):
        blocks = depth if settings.weight_groups else last
        found["forward"] = stream * (blocks * (2 + middle) + 1)
        awaited["forward"] = stream * (blocks * (1 + middle) + 1)
    if settings.weight_groups:
        found["gradients"] = stream * (3 * depth + 2)
        awaited["gradients"] = stream * (depth + 1)
    if not c.statistics:
        for index in range(last):
            block = config.of_block(index)
            q, inner = (opened_width(block, stage) / hidden for stage in (0, 2))
            inner *= not opens_again(platform)
            # Entrance, middle and exit of the float model, for the stages that want them.
            fitted = c.num_windows / c.all_windows * middle
            if settings.true_sequential:
                found["hessians"] += int(stream * (4 + q + 6 * fitted + q + 1 + inner))
            else:
                found["hessians"] += int(stream * (1 + 3 * fitted))
            if index + 1 < last and c.inputs == "quantized":
                whole = not settings.true_sequential or settings.tune.block
                found["advance"] += int(stream * (2 if whole else 2 + inner))
                awaited["advance"] += stream
    windows = evaluated or e.num_windows
    item = 4 if e.products == FLOAT32 else 2
    awaited["evaluate"] = 2 * depth * item * windows * e.seqlen * hidden
    found["evaluate"] = 2 * awaited["evaluate"]
    return {stage: Traffic(size, awaited[stage]) for stage, size in found.items() if size}


def layer_launches(settings: Any, rows: int, cols: int) -> float | None:
    """Kernels that quantizing a whole layer launches on an accelerator; None: not known."""
    if not isinstance(settings, GPTVQSettings):
        return None
    grid = settings.grid(rows, cols)
    more = max(0, -(-settings.codebook_size // _CHUNK) - 1)
    vectors, strips = grid.padded_cols // grid.dim, grid.col_strips
    block = grid.block_cols(settings.block_size)
    by_vector = vectors * (OF_A_VECTOR[0] + more * OF_A_VECTOR[1])
    by_block = grid.padded_cols / block * OF_A_BLOCK
    swept, coded = by_vector, by_vector
    if takes_kernel(settings, rows, cols):
        swept, coded = by_block + strips * OF_A_STRIP, by_block if settings.beam == 1 else by_vector
    size = swept + settings.polish_rounds * coded
    size += strips * settings.codebook_size * OF_A_SEED * (settings.seed == "kmeans++")
    return size + strips * settings.em_iterations * (OF_A_STEP[0] + more * OF_A_STEP[1])


def takes_kernel(settings: GPTVQSettings, rows: int, cols: int) -> bool:
    """Whether the kernel for a block of columns on a GPU has room for a layer."""
    grid = settings.grid(rows, cols)
    block, shape = grid.block_cols(settings.block_size), (grid.padded_cols, grid.padded_rows)
    try:
        columns.check(block, grid.dim, settings.codebook_size, shape)
    except NotImplementedError:
        return False
    return True


def launches(config: ModelConfig, settings: RunSettings) -> float | None:
    """Of quantizing all layers; None where a method's are not known."""
    size, groups = 0.0, settings.calibration.gradient_groups or 1
    cache: dict[Any, float | None] = {}
    for layer, (rows, cols) in linear_layers(settings, config).items():
        used = used_settings(settings, layer_format(settings, *layer))
        for of in used:
            key = of, rows, cols
            if key not in cache:
                cache[key] = layer_launches(of, rows // groups, cols)
            if cache[key] is None:
                return None
            size += groups * cache[key] / len(used)
    return size
