"""Perplexity: one walk over the blocks, whatever the number of windows.

It multiplies by dense kernels, also where the model is packed: each is dequantized on the device
once for all of the text. On 2 cores of a Zen 4, 4 x 1024 tokens times 4096 x 4096 weights take
1.6 s dense, 1.8 s by the packed kernel of 2D codes, 4.4 s of 1D and 6.5 s of AQLM's 2x8;
dequantizing takes 0.04 s, 0.09 s and 0.6 s.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.files.disk_space import check_room, directory_bytes
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import HEAD_CHUNK, Params, block_forward, head_logits
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.activations import FLOAT32, file_bytes
from gptvq_jax.run.embedding import head_on_device, write_embeddings
from gptvq_jax.run.stream_files import StreamFiles
from gptvq_jax.run.stream_memory import StreamMemory
from gptvq_jax.run.stream_store import StreamStore
from gptvq_jax.run.walk import walk

PRECISION = "multiplied in float32"  # models/layers.py sees to it, the packed kernels too
_MEMORY_BYTES = 256 << 20  # activations of so little text need no files
_INPUTS, _LOSSES = "evaluation", "losses"  # streams


class Evaluation:
    """A visitor of `walk` that measures the perplexity of the model whose blocks it is given.

    Activations are float32 and are multiplied as float32 (`PRECISION`), whatever the device and the
    dtype of the weights.

    Args:
      config: of the model.
      outer: its tree without blocks, of host arrays.
      windows: tokens (n, T) int32.
      batch_size: windows per forward pass.
      files: of the walk. The stream "evaluation" is what goes from block to block; "losses", behind
        the last block, is the result and stays, so that it is there after a kill. They are of this
        model and of this text.
      stopwatch: receives the seconds of stage "evaluate".
      on_block: called after every block.
    """

    releases: Sequence[str] = (_INPUTS,)

    def __init__(
        self,
        config: ModelConfig,
        outer: Params,
        windows: np.ndarray,
        batch_size: int,
        files: StreamStore,
        stopwatch: Stopwatch,
        on_block: Callable[[], None] = lambda: None,
    ):
        self._stopwatch, self._on_block = stopwatch, on_block
        self._config, self._outer, self._windows = config, outer, windows
        self._batch_size, self.files = batch_size, files
        self._depth = config.num_hidden_layers
        self._shape = (*windows.shape, config.hidden_size)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of its streams at once: at three points, and the losses."""
        count, time = self._windows.shape
        losses = file_bytes((count, time - 1, 1), FLOAT32)
        return 3 * file_bytes(self._shape, FLOAT32) + losses

    def position(self, order: range) -> int:
        """See Visitor.

        Raises:
          ValueError: the order is not that of a forward pass.
        """
        if order != range(self._depth):
            raise ValueError(
                f"{order=} must be {range(self._depth)}: losses are of the whole model"
            )
        if self.files.points(_LOSSES):
            return self._depth
        return max(self.files.points(_INPUTS), default=0)

    def begin(self) -> None:
        """See Visitor."""
        if not self.files.points(_INPUTS):
            with self.files.write(_INPUTS, 0, self._shape, FLOAT32) as out:
                write_embeddings(self._outer, self._windows, out)

    def visit(self, index: int, block: Params) -> None:
        """See Visitor. Behind the last block the losses take the place of activations."""
        with self._stopwatch.stage("evaluate"):
            if index < self._depth - 1:
                self._advance(index, block)
            else:
                self._finish(block)
        self._on_block()

    def _advance(self, index: int, block: Params) -> None:
        inputs = self.files.read(_INPUTS, index)
        with self.files.write(_INPUTS, index + 1, self._shape, FLOAT32) as out:
            for part in self._batches():
                out[part] = np.asarray(self._forward(block, inputs[part]))

    def _finish(self, block: Params) -> None:
        inputs = self.files.read(_INPUTS, self._depth - 1)
        outer = head_on_device(self._config, self._outer)
        count, time = self._windows.shape
        with self.files.write(_LOSSES, self._depth, (count, time - 1, 1), FLOAT32) as out:
            for part in self._batches():
                x = self._forward(block, inputs[part])
                nll = token_nll(self._config, outer, x, self._windows[part])
                self._stopwatch.flops(flops.head_forward(self._config, *x.shape[:2]))
                out[part] = np.asarray(nll)[..., None]

    def _forward(self, block: Params, x: np.ndarray) -> jax.Array:
        self._stopwatch.flops(flops.block_forward(self._config, *x.shape[:2]))
        return block_forward(self._config, block, x)

    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of tokens 2..T of every window, after the walk.

        It is inf above 709 nats.
        """
        nll = np.asarray(self.files.read(_LOSSES, self._depth)[:], np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.exp(nll.mean()))

    def _batches(self) -> Iterator[slice]:
        starts = range(0, len(self._windows), self._batch_size)
        return (slice(start, start + self._batch_size) for start in starts)


def perplexity(
    source: ModelSource,
    windows: np.ndarray,
    batch_size: int = 4,
    on_block: Callable[[], None] = lambda: None,
    directory: Path | None = None,
    stopwatch: Stopwatch | None = None,
) -> float:
    """exp of the mean negative log-likelihood of tokens 2..T of every window; inf above 709 nats.

    The blocks are read once. Activations, float32, are in files between them, or in memory where
    they take less than 256 MiB and there is nothing to resume.

    Args:
      source: any model, dense or packed.
      windows: tokens (n, T) int32.
      batch_size: windows per forward pass.
      on_block: called after every block.
      directory: for the files, of this model and this text alone; a killed evaluation goes on from
        what it finds there, and one that ended there has its result at once. By default a temporary
        one.
      stopwatch: receives the seconds of stages "evaluate" and "load block".

    Raises:
      FullDiskError: there is no room for the files.
    """
    stopwatch = stopwatch or Stopwatch()
    with contextlib.ExitStack() as stack:
        make = partial(
            Evaluation,
            source.config,
            source.outer(),
            windows,
            batch_size,
            stopwatch=stopwatch,
            on_block=on_block,
        )
        evaluation = make(StreamMemory())
        if directory is not None or evaluation.peak_bytes > _MEMORY_BYTES:
            if directory is None:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gptvq-")))
            check_room(directory, evaluation.peak_bytes - directory_bytes(directory))
            evaluation = make(StreamFiles(directory))
        walk(source, [evaluation], range(source.config.num_hidden_layers), stopwatch)
        return evaluation.perplexity()


@partial(jax.jit, static_argnames="config")
def token_nll(config: ModelConfig, outer, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Negative log-likelihood of each next token.

    Args:
      config: of the model.
      outer: its tree without blocks.
      x: outputs of the last block (batch, T, hidden).
      tokens: (batch, T).

    Returns:
      (batch, T - 1) float32, in nats.
    """
    batch, time = tokens.shape
    pad = -(time - 1) % HEAD_CHUNK
    x = jnp.pad(x[:, :-1], ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, pad)))
    x = jnp.moveaxis(x.reshape(batch, -1, HEAD_CHUNK, x.shape[-1]), 1, 0)
    targets = jnp.moveaxis(targets.reshape(batch, -1, HEAD_CHUNK), 1, 0)

    def chunk(args):
        x, target = args
        logits = head_logits(config, outer, x)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    nll = jnp.moveaxis(lax.map(chunk, (x, targets)), 0, 1)
    return nll.reshape(batch, -1)[:, : time - 1]
