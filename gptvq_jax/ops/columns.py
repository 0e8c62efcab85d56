"""Which kernel takes a block of columns of a sweep or a recode (moves/sweep.py, recode.py) here."""

import jax

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.ops.gpu import columns as gpu
from gptvq_jax.ops.tpu import columns as tpu

KERNELS = {"pallas_tpu": tpu, "pallas_gpu": gpu}


def choose_columns(grid: GroupGrid, size: int, block_size: int) -> str:
    """The `native` of `moves.sweep.sweep`, and of `moves.recode.recode` of one code.

    The kernel of this backend; "jax" where there is none, or where it has no room for the block.

    Args:
      grid: of the layer.
      size: K.
      block_size: columns per lazy update.
    """
    native = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(jax.default_backend(), "jax")
    if native != "jax":
        shape = grid.padded_cols, grid.padded_rows
        try:
            KERNELS[native].check(grid.block_cols(block_size), grid.dim, size, shape)
        except NotImplementedError:
            return "jax"
    return native
