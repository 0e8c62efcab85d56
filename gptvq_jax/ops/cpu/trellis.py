"""The C++ products with trellis codes as JAX functions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core.check_trellis import check_values
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.ops.cpu import trellis_parts
from gptvq_jax.ops.cpu.build import library
from gptvq_jax.ops.cpu.call import Call
from gptvq_jax.ops.cpu.trellis_layout import arrange_outliers, arrange_streams

_MAX = 127  # of an int8 level


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTrellis:
    """Streams in the order of the kernels, with what these would have to work out every time.

    Fields up to `rate_quads` are those of `trellis_layout.Streams`.
    """

    codes: jax.Array  # (bytes,) uint8
    rate_quads: jax.Array  # (7,) int32
    order: jax.Array  # (4 quads,) int32
    col_scales: jax.Array  # (4 quads,) float32, in this order
    row_scales: jax.Array  # (R,) float32
    table: jax.Array  # (2^L,) float32; or int8 plus the bias of the kernels as uint8, at least 256
    unit: jax.Array  # (1,) float32, of int8 levels
    parts: jax.Array  # of trellis_parts.py, or (0,) uint8
    outlier_rows: jax.Array  # (N,) int32
    outlier_cols: jax.Array  # (N,) int32
    outlier_values: jax.Array  # (N,) float32
    outlier_starts: jax.Array  # (cuts + 1,) int32
    cols: int = dataclasses.field(metadata={"static": True})
    stream_rows: int = dataclasses.field(metadata={"static": True})
    window_bits: int = dataclasses.field(metadata={"static": True})
    shared: bool = dataclasses.field(metadata={"static": True})  # levels that other layers have too


def check(tensor: TrellisTensor) -> None:
    """Raises NotImplementedError for a traced tensor, or if the kernels cannot be built."""
    if isinstance(tensor.codes, jax.core.Tracer):
        raise NotImplementedError(
            "its streams are put in another order first, which cannot be compiled; make the kernel "
            "outside of jax.jit"
        )
    library()


def pack(tensor: TrellisTensor, int8: bool) -> PackedTrellis:
    """The layout that the kernels read.

    Args:
      tensor: one that `check` accepts.
      int8: whether levels are rounded to int8, and so x as it is multiplied.

    Raises:
      ValueError: rates, streams and outliers contradict each other.
    """
    tensor = jax.tree.map(np.asarray, tensor)
    check_values(tensor)
    streams, outliers = arrange_streams(tensor), arrange_outliers(tensor)
    table, unit, parts = np.asarray(tensor.values()), 1.0, np.zeros(0, np.uint8)
    if int8:
        bias = library().weight_bias()
        by_parts = trellis_parts.FEWEST_BITS <= tensor.window_bits <= trellis_parts.MOST_BITS
        if by_parts and tensor.levels is None:
            parts, unit = trellis_parts.level_parts(tensor.window_bits, bias)
        else:
            unit = float(np.abs(table).max()) / _MAX or 1.0
        table = np.round(table / unit).astype(np.int16) + bias
        table = np.tile(table.astype(np.uint8), max(1, 256 // len(table)))
    scales = np.asarray(tensor.col_scales, np.float32)[streams.order]
    return PackedTrellis(
        codes=jnp.asarray(streams.codes),
        rate_quads=jnp.asarray(streams.rate_quads),
        order=jnp.asarray(streams.order),
        col_scales=jnp.asarray(np.where(streams.filled, scales, 0), jnp.float32),
        row_scales=jnp.asarray(tensor.row_scales, jnp.float32),
        table=jnp.asarray(table),
        unit=jnp.full(1, unit, jnp.float32),
        parts=jnp.asarray(parts),
        outlier_rows=jnp.asarray(outliers.rows),
        outlier_cols=jnp.asarray(outliers.cols),
        outlier_values=jnp.asarray(outliers.values),
        outlier_starts=jnp.asarray(outliers.starts),
        cols=tensor.cols,
        stream_rows=tensor.stream_rows,
        window_bits=tensor.window_bits,
        shared=tensor.levels is None,
    )


def call(packed: PackedTrellis) -> Call:
    """The kernel for a weight of shape (R, C)."""
    arrays = [getattr(packed, name) for name in _ARRAYS]
    int8 = packed.table.dtype == jnp.uint8
    arrays += [packed.table, packed.unit, packed.parts] if int8 else [packed.table]
    attributes = {
        "stream_rows": np.int64(packed.stream_rows),
        "bits": np.int64(packed.window_bits),
        "shared": packed.shared,
    }
    target = "gptvq_trellis_int8_matmul" if int8 else "gptvq_trellis_matmul"
    return Call(target, packed.row_scales.shape[0], tuple(arrays), attributes)


_ARRAYS = (
    "codes",
    "rate_quads",
    "order",
    "col_scales",
    "row_scales",
    "outlier_rows",
    "outlier_cols",
    "outlier_values",
    "outlier_starts",
)
