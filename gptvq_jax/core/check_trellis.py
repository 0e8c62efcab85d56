"""Whether the arrays of a TrellisTensor fit its static fields, and each other (check_tensor.py)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptvq_jax.console.errors import brief
from gptvq_jax.core.array_checks import MAX_SIZE, axis, check_size
from gptvq_jax.core.packing import packed_length
from gptvq_jax.core.trellis_table import MAX_BITS, MIN_BITS, TABLE_VERSION
from gptvq_jax.core.trellis_tensor import MAX_RATE, TrellisTensor, stream_bytes


def named_arrays(tensor: TrellisTensor) -> Iterator[tuple[str, Any]]:
    """(field, array) of every array, in order."""
    for field in dataclasses.fields(tensor):
        value = getattr(tensor, field.name)
        if not field.metadata.get("static") and value is not None:
            yield field.name, value


def check_static(tensor: TrellisTensor) -> None:
    """Raises ValueError for sizes that no tensor has."""
    check_size("rows", tensor.rows, MAX_SIZE)
    check_size("cols", tensor.cols, MAX_SIZE)
    if tensor.rows * tensor.cols > MAX_SIZE:
        raise ValueError(f"rows * cols = {tensor.rows * tensor.cols} must be at most {MAX_SIZE}")
    bits = tensor.window_bits
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"window_bits={brief(bits)} must be {MIN_BITS} to {MAX_BITS}")
    check_size("stream_rows", tensor.stream_rows, MAX_SIZE)
    # Streams are made whole: one that is much longer than a column is never written.
    longest = -(-max(tensor.rows, bits) // 8) * 8
    if not bits <= tensor.stream_rows <= longest:
        raise ValueError(
            f"stream_rows={tensor.stream_rows} must be from window_bits={bits} to {longest}"
        )
    if type(tensor.table) is not int or tensor.table != TABLE_VERSION:
        raise ValueError(
            f"table={brief(tensor.table)} is not {TABLE_VERSION}, the one that this gptvq_jax has; "
            "use the version that wrote it, or quantize again"
        )


def expected_arrays(tensor: TrellisTensor) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """{name: (dtypes it may have, shape)}; the bytes of the streams are counted by their values."""
    expected = {
        "codes": (("uint8",), (axis("codes", tensor.codes, 1, 0),)),
        "rates": (("uint8",), (packed_length(tensor.cols, 4),)),
        "row_scales": (("float16",), (tensor.rows,)),
        "col_scales": (("float16",), (tensor.cols,)),
    }
    if tensor.levels is not None:
        size = axis("levels", tensor.levels, 1, 0)
        if size & (size - 1) or size > 2**tensor.window_bits:
            raise ValueError(f"levels must be a power of two up to 2^window_bits, not {size}")
        expected["levels"] = (("float16",), (size,))
    if tensor.outlier_gaps is not None or tensor.outlier_values is not None:
        count = axis("outlier_gaps", tensor.outlier_gaps, 1, 0)
        expected["outlier_gaps"] = (("uint16",), (count,))
        expected["outlier_values"] = (("float16",), (count,))
    return expected


def check_values(tensor: TrellisTensor) -> None:
    """Looks into host arrays that `check_tensor` accepts.

    Raises:
      ValueError: a rate is too high, the streams are cut short or too long, or an outlier lies
        outside.
    """
    low, high = np.asarray(tensor.rates) & 15, np.asarray(tensor.rates) >> 4
    rates = np.stack([low, high], axis=1).reshape(-1)[: tensor.cols].astype(np.int64)
    most = min(MAX_RATE, tensor.window_bits)
    if rates.max() > most:
        raise ValueError(f"rates reach {rates.max()}, at most {most} is possible")
    needed = max(1, tensor.cuts * int(stream_bytes(rates, tensor.stream_rows).sum()))
    if len(tensor.codes) != needed:
        raise ValueError(f"codes has {len(tensor.codes)} bytes, the rates make it {needed}")
    if tensor.outlier_gaps is not None:
        last = int(np.sum(tensor.outlier_gaps, dtype=np.int64))
        if last >= tensor.num_values:
            raise ValueError(f"an outlier lies at {last}, beyond {tensor.num_values} weights")
