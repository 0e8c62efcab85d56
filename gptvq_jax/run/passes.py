"""The passes of a run, and which of them share a walk over the blocks.

    up     the float model over the calibration text, and its perplexity on the held-out text
    down   gradients, for token weights, and error curves, for the allocation of bits
    up     quantization
    up     the quantized model's perplexity, from the checkpoint

Where no gradients are wanted, the float model and quantization share one walk: no more of its
activations are kept than the block at work needs.
"""

from collections.abc import Sequence

import numpy as np

from gptvq_jax.config import RunSettings, to_dict
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.models.llama import LINEAR_LAYERS
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run import allocation, gradients
from gptvq_jax.run.activations import num_bytes
from gptvq_jax.run.context import Context
from gptvq_jax.run.forward import Forward
from gptvq_jax.run.gradients import Backward
from gptvq_jax.run.quantize import Plan, Quantize, num_quantized, wants_float, wants_middle
from gptvq_jax.run.sizes import stored_bytes
from gptvq_jax.run.walk import Visitor, walk
from gptvq_jax.run.workdir import WorkDir


def quantize_model(
    source: ModelSource,
    settings: RunSettings,
    workdir: WorkDir,
    tokens: np.ndarray,
    stopwatch: Stopwatch,
) -> None:
    """Quantizes all linear layers and writes the packed checkpoint, resuming where it can.

    Args:
      source: the float model.
      settings: of the run.
      workdir: opened with these settings.
      tokens: calibration windows (n, T).
      stopwatch: receives the seconds of every stage.

    Raises:
      ValueError: an activation or a gradient is not finite, or a file that is needed is lost.
      FullDiskError: the disk lacks the room; said before a pass computes anything.
    """
    job = _Job(source, settings, workdir, tokens, stopwatch)
    plan: Plan = {}
    if settings.weight_groups:
        job.gradients()
        if settings.allocation.bits_per_value:
            plan = allocation.plan(settings, workdir, job.num_quantized)
    job.quantize(plan)


class _Job:
    """The walks of one run."""

    def __init__(self, source, settings, workdir, tokens, stopwatch):
        self._context = Context(source, settings, workdir, _Silent(), stopwatch)
        self._tokens = tokens
        self._depth = source.config.num_hidden_layers
        self.num_quantized = num_quantized(self._context)

    def gradients(self) -> None:
        """Token weights of all blocks, and curves of those that will be quantized."""
        source, settings, workdir, _, _ = self._context
        down = range(self._depth - 1, -1, -1)
        measured = self.num_quantized if settings.allocation.bits_per_value else 0
        keep = wants_float(self._context)
        groups = settings.weight_groups
        backward = Backward(self._context, self._tokens, groups, measured, keep)
        done = backward.position(down)
        if done == self._depth:
            return
        shape = self._tokens.shape
        room = gradients.peak_bytes(source.config, shape, groups, self._depth - done)
        room += self._stream_bytes(self._depth + 1, self._depth * wants_middle(self._context))
        room += allocation.curve_bytes(measured, len(settings.candidates))
        workdir.check_room(room, "activations/*", "gradients/*", "curves/*")
        self._walk([self._forward(self._depth, 0)], range(self._depth), "float model", "block")
        self._walk([backward], down, "gradients", "block")
        ...
