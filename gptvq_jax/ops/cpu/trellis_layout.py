"""Streams of trellis codes in the order in which the C++ kernels read them; on the host, once.

For each cut of T rows, for each rate from 1 up: its columns in fours, the last four filled up with
zeros; of each column the whole stream, T K bits, and behind it its first L - K bits again, so that
every window lies in one piece. That is two bytes more than is stored at most, for each stream.
"""

from typing import NamedTuple

import numpy as np

from gptvq_jax.core.trellis_tensor import MAX_RATE, TrellisTensor, stream_bytes

SLACK = 128  # bytes at the end, which are read and not used (kTrellisSlack)


class Streams(NamedTuple):
    codes: np.ndarray  # (bytes,) uint8
    rate_quads: np.ndarray  # (MAX_RATE + 1,) int32: fours of columns of each rate
    order: np.ndarray  # (4 quads,) int32: the column of each; 0 where there is none
    filled: np.ndarray  # (4 quads,) bool: whether there is one


class Outliers(NamedTuple):
    """Of a cut after those of the one before."""

    rows: np.ndarray  # (N,) int32
    cols: np.ndarray  # (N,) int32
    values: np.ndarray  # (N,) float32
    starts: np.ndarray  # (cuts + 1,) int32: where those of each cut begin


def arrange_streams(tensor: TrellisTensor) -> Streams:
    """The streams of a tensor in the order of the kernels."""
    rates = np.asarray(tensor.column_rates())
    stored = np.asarray(tensor.codes)
    cuts, rows, first = tensor.cuts, tensor.stream_rows, 0
    parts, orders, filled = [], [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    quads = np.zeros(MAX_RATE + 1, np.int32)
    for rate in range(1, MAX_RATE + 1):
        (columns,) = np.nonzero(rates == rate)
        if not len(columns):
            continue
        size = int(stream_bytes(rate, rows))
        count, missing = len(columns), -len(columns) % 4
        streams = stored[first : first + cuts * count * size].reshape(cuts, count, size)
        first += streams.size
        whole = _go_on(streams, rows * rate, tensor.window_bits - rate)
        whole = np.pad(whole, ((0, 0), (0, missing), (0, 0)))
        parts.append(whole.reshape(cuts, -1))
        orders.append(np.pad(columns, (0, missing)).astype(np.int32))
        filled.append(np.arange(count + missing) < count)
        quads[rate] = (count + missing) // 4
    codes = np.concatenate(parts, axis=1).reshape(-1) if parts else np.zeros(0, np.uint8)
    codes = np.pad(codes, (0, SLACK))
    return Streams(codes, quads, np.concatenate(orders), np.concatenate(filled))


def arrange_outliers(tensor: TrellisTensor) -> Outliers:
    """The outliers of a tensor by the cut of their rows, in one in the order that they had."""
    if tensor.outlier_gaps is None:
        none = np.zeros(0, np.int32)
        return Outliers(none, none, np.zeros(0, np.float32), np.zeros(tensor.cuts + 1, np.int32))
    places = np.cumsum(np.asarray(tensor.outlier_gaps, np.int64))
    rows, cols = places % tensor.rows, places // tensor.rows
    cut = rows // tensor.stream_rows
    by_cut = np.argsort(cut, kind="stable")
    starts = np.searchsorted(cut[by_cut], np.arange(tensor.cuts + 1))
    values = np.asarray(tensor.outlier_values, np.float32)
    return Outliers(
        rows[by_cut].astype(np.int32),
        cols[by_cut].astype(np.int32),
        values[by_cut],
        starts.astype(np.int32),
    )


def _go_on(streams: np.ndarray, bits: int, more: int) -> np.ndarray:
    """Streams (..., bytes) of so many bits, with their first `more` bits behind them."""
    if bits % 8 == 0:
        return np.concatenate([streams, streams[..., : -(-more // 8)]], axis=-1)
    bit = np.unpackbits(streams, axis=-1, count=bits, bitorder="little")
    return np.packbits(np.concatenate([bit, bit[..., :more]], axis=-1), axis=-1, bitorder="little")
