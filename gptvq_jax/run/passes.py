"""The passes of a run, and which of them share a walk over the blocks.

    up     the float model over the calibration text
    down   gradients, for token weights, and error curves, for the allocation of bits
    up     quantization

Where no gradients are wanted, the float model and quantization share one walk: no more of its
activations are kept than the block at work needs.
"""

from collections.abc import Sequence

import numpy as np

from gptvq_jax.config import RunSettings
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.shapes import opened_width
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run import allocation, gradients
from gptvq_jax.run.activations import file_bytes
from gptvq_jax.run.context import Context
from gptvq_jax.run.formats import Plan, num_quantized
from gptvq_jax.run.forward import Forward, wants_float, wants_middle
from gptvq_jax.run.gradients import Backward
from gptvq_jax.run.outer import outer_steps
from gptvq_jax.run.packed_block import STREAM
from gptvq_jax.run.quantize import Quantize
from gptvq_jax.run.sizes import stored_bytes
from gptvq_jax.run.walk import Visitor, walk
from gptvq_jax.run.workdir import WorkDir


def quantize_model(
    source: ModelSource,
    settings: RunSettings,
    workdir: WorkDir,
    tokens: np.ndarray,
    stopwatch: Stopwatch,
    riders: Sequence[Visitor] = (),
) -> Quantize:
    """Quantizes all linear layers and writes the blocks of the checkpoint, resuming where it can.

    Args:
      source: the float model.
      settings: of the run.
      workdir: opened with these settings.
      tokens: calibration windows (n, T).
      stopwatch: receives the seconds of every stage.
      riders: other visitors of the float model's blocks, upwards; they join the first walk.

    Returns:
      The pass that wrote them; its `writer` finishes the checkpoint.

    Raises:
      ValueError: an activation or a gradient is not finite, or a file that is needed is lost.
      FullDiskError: the disk lacks the room; said before a pass computes anything.
    """
    context = Context(source, settings, workdir, None, stopwatch)
    plan: Plan = {}
    if settings.weight_groups:
        find_gradients(context, tokens, riders)
        if settings.allocation.bits_per_value:
            plan = allocation.plan(settings, workdir, num_quantized(settings, source.config))
    return quantize_blocks(context, tokens, plan, riders)


def find_gradients(context: Context, tokens: np.ndarray, riders: Sequence[Visitor] = ()) -> None:
    """Token weights of all blocks, and curves of those that will be quantized.

    `riders` join the walk of the float model.
    """
    source, settings, workdir, _, stopwatch = context
    depth, groups = source.config.num_hidden_layers, settings.weight_groups
    allocates = settings.allocation.bits_per_value > 0
    measured = num_quantized(settings, source.config) if allocates else 0
    middle, keep = wants_middle(settings), wants_float(settings)
    down = range(depth - 1, -1, -1)
    backward = Backward(context, tokens, groups, measured, keep)
    done = backward.position(down)
    if done == depth:
        walk(source, [backward], down, stopwatch)  # drops what a kill has left
        return
    # The walk down has dropped what lay behind it, and needs no more than what is ahead.
    points = depth + 1 if keep or not done else min(depth + 1, depth - done + 2)
    room = (points + depth * middle) * _stream_bytes(source.config, tokens.shape)
    room += gradients.peak_bytes(source.config, tokens.shape, groups)
    room += allocation.curve_bytes(source.config, settings, measured)
    workdir.check_room(room, "activations/*", "gradients/*", "curves/*")
    with Progress(depth, "float model", "block") as progress:
        wanted = depth if keep or not done else depth - 1 - done
        forward = Forward(context, tokens, wanted, 0, middle)
        walk(source, [forward, *riders], range(depth), stopwatch, progress)
    with Progress(depth, "gradients and curves" if measured else "gradients", "block") as progress:
        own = context._replace(progress=progress)
        backward = Backward(own, tokens, groups, measured, keep)
        walk(source, [backward], down, stopwatch, progress)


def quantize_blocks(
    context: Context, tokens: np.ndarray, plan: Plan, riders: Sequence[Visitor] = ()
) -> Quantize:
    """The packed blocks. `riders` join the walk over the float ones."""
    source, settings, workdir, _, stopwatch = context
    depth = source.config.num_hidden_layers
    with Progress(steps(source.config, settings), "quantize", "step") as progress:
        own = context._replace(progress=progress)
        quantize = Quantize(own, tokens, plan)
        done = sum(block_steps(source.config, settings, i) for i in range(quantize.finished))
        progress.skip(done + outer_steps(settings, source.config) * (quantize.finished > 0))
        visitors, made = [quantize], False
        if wants_float(settings):
            last, first = num_quantized(settings, source.config), quantize.finished
            of_float = Forward(own, tokens, last, first, wants_middle(settings))
            visitors.insert(0, of_float)
            # Another run may have made them (study/sweep): they give no room to others.
            made = not settings.weight_groups and of_float.position(range(depth)) == depth
        if quantize.finished < depth:
            room = peak_bytes(source.config, settings, tokens.shape, quantize.finished, made)
            room += stored_bytes(source.config, settings, plan)
            streams = f"activations/*.{STREAM}.npy" if made else "activations/*"
            workdir.check_room(room, streams, "checkpoint/**/*")
        walk(source, [*visitors, *riders], range(depth), stopwatch)
    return quantize


def steps(config: ModelConfig, settings: RunSettings) -> int:
    """By how much `Quantize` advances the progress: layers it quantizes, and epochs of tuning."""
    of_blocks = sum(block_steps(config, settings, i) for i in range(config.num_hidden_layers))
    return outer_steps(settings, config) + of_blocks


def block_steps(config: ModelConfig, settings: RunSettings, index: int) -> int:
    """The same for one block."""
    if index >= num_quantized(settings, config):
        return 0  # it stays dense
    return len(config.of_block(index).linear_layers) + settings.tune.block * settings.tune.epochs


def peak_bytes(
    config: ModelConfig,
    settings: RunSettings,
    shape: tuple[int, int],
    finished: int,
    made: bool = False,
) -> int:
    """Most bytes of all streams at once while blocks are quantized.

    A stream has the inputs of the last finished block, of the one at work and of the next. What the
    walk before this one has left of the float model is all there.

    Args:
      config: of the model.
      settings: of the run.
      shape: of the tokens (n, T).
      finished: blocks that are done.
      made: whether the streams of the float model are all there, and count for nothing.
    """
    last = num_quantized(settings, config)
    if finished >= last:
        return 0
    stream = _stream_bytes(config, shape)
    behind = max(0, finished - 1)  # blocks whose inputs there are no more
    inputs = last - behind
    whole = config.num_hidden_layers - behind if settings.weight_groups else None
    count = min(3, inputs) if settings.calibration.inputs == "quantized" else 0
    size = 0
    if wants_float(settings) and not made:
        count += min(3, inputs + 1) if whole is None else whole + 1
    if wants_middle(settings) and not made:
        count += min(2, inputs) if whole is None else whole
    if settings.true_sequential:
        count += 1
        blocks = config.block_counts(last)
        width = max(opened_width(block, stage) for block in blocks for stage in (0, 2))
        size += file_bytes((*shape, width))
    return size + count * stream


def _stream_bytes(config: ModelConfig, shape: tuple[int, int]) -> int:
    return file_bytes((*shape, config.hidden_size))
