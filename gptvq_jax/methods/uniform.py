"""Uniform grids with groups: GPTQ (arXiv 2210.17323) and round-to-nearest."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptvq_jax.core import flops
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.packing import packed_length
from gptvq_jax.core.uniform_grid import uniform_grid
from gptvq_jax.core.vq_tensor import VQTensor, pack_codes
from gptvq_jax.methods.check_fields import field_check
from gptvq_jax.methods.devices import quantize_rows
from gptvq_jax.moves.sweep import pad_identity, sweep
from gptvq_jax.moves.uniform import factored, uniform_fit
from gptvq_jax.ops.columns import choose_columns


@dataclasses.dataclass(frozen=True)
class UniformSettings:
    """A uniform grid per group of consecutive inputs of a row."""

    bits: int = 3  # bits of a code
    group_size: int = 128  # inputs that share a scale; 0: a whole row
    symmetric: bool = False  # True: no offset, 16 bits less per group
    block_size: int = 128  # columns per lazy update of the sweep

    def __post_init__(self):
        check = field_check(self, "uniform")
        check(1 <= self.bits <= 8, "bits", "1 to 8")
        check(self.group_size >= 0, "group_size", "at least 0")
        check(self.block_size >= 1, "block_size", "at least 1")

    def flops(self, rows: int, cols: int) -> int:
        """Of matrix products of a layer."""
        return flops.lazy_pass(rows, cols, self.grid(rows, cols).block_cols(self.block_size))

    def bytes(self, rows: int, cols: int) -> int:
        """Of a packed layer: codes of a row, scales and offsets of its groups, and their levels."""
        grid, numbers = self.grid(rows, cols), 1 if self.symmetric else 2
        codes = packed_length(cols, self.bits)
        return rows * codes + 2 * numbers * (rows * grid.col_strips + 2**self.bits)

    def grid(self, rows: int, cols: int) -> GroupGrid:
        """Groups of a rows x cols weight."""
        return uniform_grid(rows, cols, self.group_size)


def gptq(
    weight: jax.Array,
    hessian: jax.Array,
    hinv_chol: jax.Array,
    key: jax.Array,
    settings: UniformSettings,
    *,
    mesh: Mesh | None = None,
) -> VQTensor:
    """Rounds column by column and feeds the error forward through hinv_chol.

    Args:
      weight: (R, C).
      hessian: not used; here so that every method has one signature.
      hinv_chol: (C, C) U of the damped Hessian, in any unit.
      key: not used.
      settings: bits and groups.
      mesh: several devices, of one axis, over which the rows are spread.
    """
    del hessian
    grid, shared = settings.grid(*weight.shape), (hinv_chol, key)
    if mesh is None:
        return _gptq(weight, 0, *shared, settings, grid)
    return quantize_rows(_gptq, settings, mesh, weight, grid, shared)


@partial(jax.jit, static_argnames=("settings", "grid"))
def _gptq(weight, first_strip, hinv_chol, key, settings, grid) -> VQTensor:
    del first_strip  # nothing is drawn
    result = sweep(
        grid.pad_transpose(weight),
        pad_identity(hinv_chol, grid),
        grid,
        uniform_fit(2**settings.bits, settings.symmetric),
        key,
        block_size=settings.block_size,
        native=choose_columns(grid, 2**settings.bits, settings.block_size),
    )
    return VQTensor(
        codes=pack_codes(result.codes[None], settings.bits, grid),
        codebook=factored(result.centroids[None], settings.symmetric),
        block_scales=None,
        index_bits=settings.bits,
        grid=grid,
    )


def rtn(
    weight: jax.Array,
    hessian: jax.Array,
    hinv_chol: jax.Array,
    key: jax.Array,
    settings: UniformSettings,
    *,
    mesh: Mesh | None = None,
) -> VQTensor:
    """Rounds every weight to the nearest level: the same sweep with nothing fed forward."""
    return gptq(weight, hessian, jnp.eye(hinv_chol.shape[0]), key, settings, mesh=mesh)
