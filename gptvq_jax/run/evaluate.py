"""A model on held-out text: one walk over the blocks, whatever the number of windows.

It multiplies by dense kernels, also where the model is packed: each is dequantized on the device
once for all of the text. On 2 cores of a Zen 4, 4 x 1024 tokens times 4096 x 4096 weights take
1.6 s dense, 1.8 s by the packed kernel of 2D codes, 4.4 s of 1D and 6.5 s of AQLM's 2x8;
dequantizing takes 0.04 s, 0.09 s and 0.6 s.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.core import products
from gptvq_jax.files.disk_space import check_room, directory_bytes
from gptvq_jax.models import flops
from gptvq_jax.models.llama import Params, block_forward
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run import spread
from gptvq_jax.run.activations import BFLOAT16, FLOAT32, file_bytes
from gptvq_jax.run.embedding import head_on_device, write_embeddings
from gptvq_jax.run.stream_files import StreamFiles
from gptvq_jax.run.stream_memory import StreamMemory
from gptvq_jax.run.stream_store import StreamStore
from gptvq_jax.run.token_losses import token_nll
from gptvq_jax.run.walk import walk

# Of activations; what they are multiplied with has their dtype, and sums are float32
# (models/layers.py sees to it).
DTYPES = {products.FLOAT32: FLOAT32, products.BFLOAT16: BFLOAT16}
_MEMORY_BYTES = 256 << 20  # activations of so little text need no files


def precision_text(of_products: str) -> str:
    """How models are multiplied, for the line of a figure."""
    return f"multiplied in {of_products}"


class Evaluation:
    """A visitor of `walk` that takes held-out text through the model whose blocks it is given.

    Activations are float32 and are multiplied as float32, whatever the device and the dtype of the
    weights; or all of these are bfloat16. Logits and losses are float32 in any case. What is behind
    the last block stays, so that it is there after a kill, and so that what is said of a token may
    depend on two models without anybody storing logits.

    The names of its streams hold a digest of the weights, the tokens and the products: files of
    another model or of another text, which may be in the same directory, are not taken for its own.

    Args:
      source: the model, dense or packed.
      windows: tokens (n, T) int32.
      batch_size: windows per forward pass.
      files: of the walk. "evaluation-DIGEST" is what goes from block to block; "outputs-DIGEST",
        (n, T, hidden) behind the last block, is the result.
      stopwatch: receives the seconds of stage "evaluate".
      outputs_dtype: of the result, float32 or bfloat16; None: that of the products.
      products: 'float32' or 'bfloat16'.
    """

    def __init__(
        self,
        source: ModelSource,
        windows: np.ndarray,
        batch_size: int,
        files: StreamStore,
        stopwatch: Stopwatch,
        outputs_dtype: np.dtype | None = None,
        products: str = products.FLOAT32,
    ):
        self.source, self.windows, self.files = source, windows, files
        self._dtype = DTYPES[products]
        self._outputs_dtype = outputs_dtype or self._dtype
        self.config = source.config
        self._batch_size, self.stopwatch = batch_size, stopwatch
        self._depth = self.config.num_hidden_layers
        self._shape = (*windows.shape, self.config.hidden_size)
        of_what = f"{source.fingerprint} {windows.shape} {windows.dtype} {products} ".encode()
        digest = hashlib.sha256(of_what + windows.tobytes()).hexdigest()[:12]
        self._inputs, self._outputs = f"evaluation-{digest}", f"outputs-{digest}"
        self.releases = (self._inputs,)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of its streams at once: at three points."""
        return 3 * file_bytes(self._shape, self._dtype)

    @property
    def finished(self) -> bool:
        """Whether the outputs are there."""
        return bool(self.files.points(self._outputs))

    def check_room(self, more: int = 0) -> None:
        """Checks, before anything is computed, that there is room for its files.

        Args:
          more: bytes that will be written beside them.

        Raises:
          FullDiskError: there is not.
        """
        directory, own = self.files.directory, (self._inputs, self._outputs)
        present = sum(directory_bytes(directory, f"*.{stream}.npy") for stream in own)
        check_room(directory, more + (0 if self.finished else self.peak_bytes - present))

    def position(self, order: range) -> int:
        """See Visitor.

        Raises:
          ValueError: the order is not that of a forward pass.
        """
        if order != range(self._depth):
            raise ValueError(
                f"{order=} must be {range(self._depth)}: outputs are of the whole model"
            )
        if self.finished:
            return self._depth
        return max(self.files.points(self._inputs), default=0)

    def begin(self) -> None:
        """See Visitor."""
        if not self.files.points(self._inputs):
            with self.files.write(self._inputs, 0, self._shape, self._dtype) as out:
                write_embeddings(self.config, self.source.outer(), self.windows, out)

    def visit(self, index: int, block: Params) -> None:
        """See Visitor."""
        last = index == self._depth - 1
        stream = self._outputs if last else self._inputs
        dtype = self._outputs_dtype if last else self._dtype
        with self.stopwatch.stage("evaluate"):
            inputs = self._read(self._inputs, index)
            block = spread.on_all(block)
            with self.files.write(stream, index + 1, self._shape, dtype) as out:
                for part in self.batches():
                    out[spread.mine(part)] = np.asarray(self._forward(index, block, inputs, part))

    def _forward(self, index: int, block: Params, inputs: Any, part: slice) -> jax.Array:
        config, x = self.config.of_block(index), inputs[spread.mine(part)]
        self.stopwatch.flops(flops.block_forward(config, *x.shape[:2]))
        return spread.run(_block_forward, (config,), block, x, part=part)[0]

    def outputs(self) -> Any:
        """Those of the last block after the walk, (n, T, hidden), which slices of windows give."""
        return self._read(self._outputs, self._depth)

    def _read(self, stream: str, point: int) -> Any:
        try:
            return self.files.read(stream, point)
        except ValueError as error:
            raise ValueError(f"{error}; remove it, and it is made again") from None

    def head(self) -> Params:
        """What turns outputs into logits, on the device."""
        return head_on_device(self.config, self.source.outer())

    def batches(self) -> Iterator[slice]:
        """Of windows."""
        devices = spread.num_devices()
        size = max(self._batch_size // devices, 1) * devices
        count = len(self.windows)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def losses(self, progress: Progress | None = None) -> np.ndarray:
        """Negative log-likelihood of tokens 2..T of every window (n, T - 1), after the walk.

        Args:
          progress: of windows.
        """
        outputs, head = self.outputs(), spread.on_all(self.head())
        losses = np.zeros((len(self.windows), self.windows.shape[1] - 1), np.float32)
        with self.stopwatch.stage("evaluate"):
            for part in self.batches():
                own = spread.mine(part)
                tokens = self.windows[own]
                self.stopwatch.flops(flops.head_forward(self.config, *tokens.shape))
                windows = outputs[own], tokens
                losses[own] = spread.run(_nll, (self.config,), head, windows, part=part)[0]
                if progress is not None:
                    progress.advance(steps=part.stop - part.start)
        return spread.joined(losses)


def _block_forward(static, block, x, sums):
    return block_forward(*static, block, x), sums


def _nll(static, head, windows, sums):
    return token_nll(*static, head, *windows), sums


@contextlib.contextmanager
def evaluated(
    source: ModelSource,
    windows: np.ndarray,
    batch_size: int = 4,
    stopwatch: Stopwatch | None = None,
    progress: Progress | None = None,
    products: str = products.FLOAT32,
) -> Iterator[Evaluation]:
    """An Evaluation after its walk; the blocks are read once.

    Activations are in files between them, or in memory where they take less than 256 MiB.
    They are gone when the context ends.

    Args:
      source: any model, dense or packed.
      windows: tokens (n, T) int32.
      batch_size: windows per forward pass.
      stopwatch: receives the seconds of stages "evaluate" and "load block".
      progress: of blocks.
      products: of Evaluation.

    Raises:
      FullDiskError: there is no room for the files.
    """
    stopwatch = stopwatch or Stopwatch()
    with contextlib.ExitStack() as stack:
        of_source = source, windows, batch_size
        evaluation = Evaluation(*of_source, StreamMemory(), stopwatch, products=products)
        if evaluation.peak_bytes > _MEMORY_BYTES:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gptvq-"))
            files = StreamFiles(Path(directory))
            evaluation = Evaluation(*of_source, files, stopwatch, products=products)
            evaluation.check_room()
        order = range(source.config.num_hidden_layers)
        walk(source, [evaluation], order, stopwatch, progress)
        yield evaluation


def perplexity(
    source: ModelSource,
    windows: np.ndarray,
    batch_size: int = 4,
    products: str = products.FLOAT32,
) -> float:
    """exp of the mean negative log-likelihood of tokens 2..T of every window; inf above 709 nats.

    Args and errors are those of `evaluated`.
    """
    with evaluated(source, windows, batch_size, products=products) as evaluation:
        return perplexity_of(evaluation.losses())


def perplexity_of(losses: np.ndarray) -> float:
    """The same, of the losses."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.exp(losses.mean(dtype=np.float64)))
