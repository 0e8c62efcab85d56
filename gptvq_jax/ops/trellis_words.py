"""Trellis streams in 32-bit words, laid out anew for kernels on accelerators, at the same bits.

32 rows of a column of rate K are K words: a chunk. Its row i has its window at bit i K, so that
shifts are the same in all columns of one rate. The windows of a chunk's last rows go on in the
first word of the next chunk, those of a stream's last chunk in its first. A stream whose rows fill
no whole chunks is prolonged by its own beginning, as far as its last window reaches.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptvq_jax.core import packing
from gptvq_jax.core.trellis_tensor import MAX_RATE, TrellisTensor, stream_bytes

ROWS = 32  # of a chunk


@dataclasses.dataclass(frozen=True)
class Streams:
    """Sizes of a tensor's streams."""

    rows: int  # R
    cols: int  # C
    stream_rows: int  # T
    window_bits: int  # L

    @classmethod
    def of(cls, tensor: TrellisTensor) -> "Streams":
        return cls(tensor.rows, tensor.cols, tensor.stream_rows, tensor.window_bits)

    @property
    def cuts(self) -> int:
        """Streams of a column."""
        return -(-self.rows // self.stream_rows)

    @property
    def chunks(self) -> int:
        """Of a stream."""
        whole = self.stream_rows % ROWS == 0
        return -(-(self.stream_rows + (0 if whole else self.window_bits)) // ROWS)

    def restore_rows(self, y: jax.Array) -> jax.Array:
        """Outputs (N, cuts, chunks * 32) -> (N, R)."""
        return y[:, :, : self.stream_rows].reshape(len(y), -1)[:, : self.rows]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outside:
    """What is not in the streams: scales of rows, and outliers in the order of their rows."""

    row_scales: jax.Array  # (R,) float16
    rows: jax.Array  # (N,) int32
    cols: jax.Array  # (N,) int32
    values: jax.Array  # (N,) float16

    def apply(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """y (N, R) float32 of the streams -> that of the weight, from x (N, C)."""
        y = y * self.row_scales.astype(jnp.float32)
        if not len(self.rows):
            return y
        added = jnp.take(x, self.cols, axis=1).astype(jnp.float32)
        added = added * self.values.astype(jnp.float32)
        return y.at[:, self.rows].add(added, indices_are_sorted=True)


def check_known(tensor: TrellisTensor) -> None:
    """Raises NotImplementedError where only a running program knows the rates of the columns."""
    if isinstance(tensor.rates, jax.core.Tracer):
        raise NotImplementedError(
            "the rates of its columns, which its layout depends on, are traced here; call "
            "make_kernel on the tensor outside of jax.jit"
        )


def stream_words(tensor: TrellisTensor) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{rate: (its columns (n,), their words (cuts, chunks, K, n) uint32)}, of rates that occur.

    On the host: sizes depend on the rates.
    """
    streams = Streams.of(tensor)
    stored = np.asarray(tensor.codes)
    rates = np.asarray(packing.unpack(jnp.asarray(tensor.rates), 4, tensor.cols))
    first, found = 0, {}
    for rate in range(1, MAX_RATE + 1):
        columns = np.flatnonzero(rates == rate)
        shape = streams.cuts, len(columns), int(stream_bytes(rate, tensor.stream_rows))
        of_rate = stored[first : first + int(np.prod(shape))].reshape(shape)
        first += of_rate.size
        if len(columns):
            words = _words(of_rate, rate * tensor.stream_rows, rate * ROWS * streams.chunks)
            words = words.reshape(*shape[:2], streams.chunks, rate)
            found[rate] = columns, words.transpose(0, 2, 3, 1)
    return found


def cut_windows(words: list[jax.Array], rate: int, bits: int) -> Iterator[jax.Array]:
    """The windows, of `bits` bits, of row after row of chunks.

    Args:
      words: the K = `rate` ones of each chunk, and the first of the chunk behind it; of one shape.
    """
    for start in range(0, ROWS * rate, rate):
        word, shift = divmod(start, 32)
        window = lax.shift_right_logical(words[word], words[word].dtype.type(shift))
        if shift + bits > 32:
            window |= words[word + 1] << (32 - shift)
        yield window & (2**bits - 1)


def outside(tensor: TrellisTensor) -> Outside:
    """The rest of a tensor."""
    if tensor.outlier_gaps is None:
        none = jnp.zeros(0, jnp.int32)
        return Outside(jnp.asarray(tensor.row_scales), none, none, jnp.zeros(0, jnp.float16))
    rows, cols = map(np.asarray, tensor.outlier_positions())
    order = np.argsort(rows, kind="stable")
    values = np.asarray(tensor.outlier_values)[order]
    arrays = tensor.row_scales, rows[order], cols[order], values
    return Outside(*map(jnp.asarray, arrays))


def _words(stored: np.ndarray, bits: int, needed: int) -> np.ndarray:
    """(..., needed / 32) uint32 of streams (..., bytes) of so many bits, which go round."""
    if bits != needed:
        one_by_one = np.unpackbits(stored, axis=-1, count=bits, bitorder="little")
        again = np.take(one_by_one, np.arange(needed) % bits, axis=-1)
        stored = np.packbits(again, axis=-1, bitorder="little")
    return np.ascontiguousarray(stored).view("<u4").astype(np.uint32, copy=False)
