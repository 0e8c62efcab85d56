"""The C++ product with trellis codes as a JAX function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core.trellis_tensor import TrellisTensor, stream_offsets
from gptvq_jax.ops.cpu.call import Call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTrellis:
    """The stored streams, and beside them what the kernel would have to work out every time."""

    codes: jax.Array  # (bytes,) uint8
    rates: jax.Array  # (C,) int32
    offsets: jax.Array  # (cuts, C) int32: where the streams begin
    table: jax.Array  # (2^L,) float32
    row_scales: jax.Array  # (R,) float32
    col_scales: jax.Array  # (C,) float32
    outlier_rows: jax.Array  # (N,) int32
    outlier_cols: jax.Array  # (N,) int32
    outlier_values: jax.Array  # (N,) float32
    stream_rows: int = dataclasses.field(metadata={"static": True})


def pack(tensor: TrellisTensor) -> PackedTrellis:
    """Offsets, the table and positions of outliers, worked out once."""
    rates = tensor.column_rates()
    none = jnp.zeros(0, jnp.int32)
    row, col = (none, none) if tensor.outlier_gaps is None else tensor.outlier_positions()
    added = () if tensor.outlier_values is None else tensor.outlier_values
    return PackedTrellis(
        codes=jnp.asarray(tensor.codes),
        rates=rates,
        offsets=stream_offsets(rates, tensor.cuts, tensor.stream_rows),
        table=tensor.values(),
        row_scales=jnp.asarray(tensor.row_scales, jnp.float32),
        col_scales=jnp.asarray(tensor.col_scales, jnp.float32),
        outlier_rows=row,
        outlier_cols=col,
        outlier_values=jnp.asarray(added, jnp.float32),
        stream_rows=tensor.stream_rows,
    )


def call(packed: PackedTrellis) -> Call:
    """The kernel for a weight of shape (R, C)."""
    arrays = (
        packed.codes,
        packed.rates,
        packed.offsets,
        packed.table,
        packed.row_scales,
        packed.col_scales,
        packed.outlier_rows,
        packed.outlier_cols,
        packed.outlier_values,
    )
    attributes = {"stream_rows": np.int64(packed.stream_rows)}
    return Call("gptvq_trellis_matmul", packed.row_scales.shape[0], arrays, attributes)
