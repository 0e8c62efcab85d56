"""Codes that have been chosen again, as bytes of a stored weight, and back."""

import dataclasses

import jax
import numpy as np

from gptvq_jax.core import packing
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor, pack_streams, stream_bytes
from gptvq_jax.methods.trainable import Unpacked, unpack


def pack_again(leaf: QuantizedTensor, codes: jax.Array) -> QuantizedTensor:
    """The tensor with other codes; spare bits are 0.

    Args:
      leaf: of any codes.
      codes: what `small_codes` of the result gives.
    """
    if not isinstance(leaf, TrellisTensor):
        return dataclasses.replace(leaf, codes=packing.pack(codes, leaf.index_bits))
    rates, windows = np.asarray(leaf.column_rates()), np.asarray(codes, np.int32)
    # Rows of padding: what the last row's window has beyond the bits of that row itself.
    more = leaf.cuts * leaf.stream_rows - leaf.rows
    behind = np.arange(1, more + 1)[:, None] * rates
    windows = np.concatenate([windows, windows[-1] >> np.minimum(behind, leaf.window_bits)])
    streams = (windows & ((1 << rates) - 1)).reshape(leaf.cuts, leaf.stream_rows, leaf.cols)
    return dataclasses.replace(leaf, codes=jax.numpy.asarray(pack_streams(streams, rates)))


def to_bytes(unpacked: Unpacked, codes: jax.Array) -> np.ndarray:
    """The stored bytes (count_bytes,) uint8 of other codes of a leaf."""
    return np.asarray(pack_again(unpacked.leaf, codes).codes).reshape(-1)


def from_bytes(unpacked: Unpacked, stored: np.ndarray) -> jax.Array:
    """The codes that `to_bytes` has made bytes of."""
    leaf = unpacked.leaf
    if isinstance(leaf, TrellisTensor):
        leaf = dataclasses.replace(leaf, outlier_gaps=None, outlier_values=None)
    else:
        stored = stored.reshape(len(unpacked.codes), leaf.grid.rows, -1)
    return unpack(dataclasses.replace(leaf, codes=stored)).codes


def count_bytes(unpacked: Unpacked) -> int:
    """Bytes of the codes of a leaf."""
    leaf = unpacked.leaf
    if isinstance(leaf, TrellisTensor):
        of_streams = stream_bytes(np.asarray(leaf.column_rates()), leaf.stream_rows)
        return max(1, leaf.cuts * int(of_streams.sum()))
    rows = len(unpacked.codes) * leaf.grid.rows
    return rows * packing.packed_length(leaf.grid.num_vectors, leaf.index_bits)
