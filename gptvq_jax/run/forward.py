"""The float model's forward pass over the calibration text: the streams "float" and "middle".

"float" is x between the blocks, "middle" x between the halves of a block. The backward pass starts
from them; an asymmetric target and the tuning of blocks aim at them. The pass runs once, whoever
reads what it leaves.
"""

from contextlib import nullcontext
from functools import partial

import jax
import numpy as np

from gptvq_jax.config import RunSettings
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Params, run_stage
from gptvq_jax.run import spread
from gptvq_jax.run.calibrate import finite, on_device, window_batches
from gptvq_jax.run.context import Context
from gptvq_jax.run.embedding import write_embeddings

STREAM, MIDDLE = "float", "middle"


class Forward:
    """A visitor of the blocks, upwards.

    Args:
      context: of the run.
      tokens: calibration windows (n, T).
      blocks: how many are wanted.
      first: what lies before this point is read no more.
      want_middle: whether "middle" is read.
    """

    releases = ()

    def __init__(
        self,
        context: Context,
        tokens: np.ndarray,
        blocks: int,
        first: int,
        want_middle: bool,
    ):
        self._context, self._tokens, self._blocks = context, tokens, blocks
        self.files = context.files
        self._first, self._want_middle = first, want_middle

    def position(self, order: range) -> int:
        """Up to the last point, unless one is missing that will be read."""
        if self._first >= self._blocks:
            return len(order)
        points = self._context.files.points(STREAM)
        done = max(points, default=0)
        whole = set(range(min(self._first, done), done + 1)) <= set(points)
        return len(order) if whole and done >= self._blocks else done if whole else 0

    def begin(self) -> None:
        """Embeds the tokens."""
        context = self._context
        shape = (*self._tokens.shape, context.source.config.hidden_size)
        with context.stopwatch.stage("forward"), context.files.write(STREAM, 0, shape) as out:
            write_embeddings(context.source.config, context.source.outer(), self._tokens, out)

    def visit(self, index: int, block: Params) -> None:
        """Writes the middle first: a block is done once its exit is there."""
        if index >= self._blocks:
            return
        _, settings, workdir, _, stopwatch = self._context
        files, config = workdir.streams, self._context.source.config.of_block(index)
        what = f"block {index}: an activation"
        with stopwatch.stage("forward"):
            x = files.read(STREAM, index)
            middle = files.write(MIDDLE, index, x.shape) if self._want_middle else nullcontext()
            with files.write(STREAM, index + 1, x.shape) as out, middle as halfway:
                block = spread.on_all(block)
                for part in window_batches(settings.calibration):
                    own = spread.mine(part)
                    windows = on_device(x[own], settings.calibration.model_products)
                    (between, y), _ = spread.run(_halves, (config,), block, windows, part=part)
                    stopwatch.flops(flops.block_forward(config, *y.shape[:2]))
                    out[own] = finite(y, what)
                    if halfway is not None:
                        halfway[own] = between


def _halves(static, block, x, sums):
    return block_halves(*static, block, x), sums


def wants_middle(settings: RunSettings) -> bool:
    """Whether the float model's states inside the blocks are compared with."""
    return settings.calibration.asymmetry > 0


def wants_float(settings: RunSettings) -> bool:
    """Whether the float model's activations are read."""
    c = settings.calibration
    of_text = c.inputs == "float" and not c.statistics
    return wants_middle(settings) or settings.tune.block or of_text


@partial(jax.jit, static_argnames="config")
def block_halves(config: ModelConfig, block: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x (batch, time, hidden) after attention, and after the block."""
    x, mixed, _ = run_stage(config, block, 0, x, None)
    middle, _, _ = run_stage(config, block, 1, x, mixed)
    x, gated, _ = run_stage(config, block, 2, middle, None)
    return middle, run_stage(config, block, 3, x, gated)[0]
