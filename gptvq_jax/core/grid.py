"""Geometry: how a weight matrix is cut into codebook groups.

Legend used in the array code of this package:
  R rows (outputs), C columns (inputs), D vector_dim, J = C / D vectors in a row,
  S column strips, G row strips (S * G groups), r rows of a strip, c columns of a strip,
  K codebook_size, M num_codebooks.
Array code works on the transposed, padded matrix (S * c, G * r): a vector of D inputs is D whole
rows of it, all outputs side by side, so every step of a column loop is one contiguous slice.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gptvq_jax.core.row_axis import ALL_HERE, RowAxis


@dataclasses.dataclass(frozen=True)
class GroupGrid:
    """A `rows` x `cols` matrix cut into row_strips x col_strips groups that own one codebook each.

    The last strip of each axis may be shorter than the others; array code pads it.
    """

    rows: int
    cols: int
    dim: int  # D: consecutive inputs in one vector
    strip_rows: int
    strip_cols: int

    def __post_init__(self):
        if min(self.rows, self.cols, self.dim, self.strip_rows, self.strip_cols) < 1:
            raise ValueError(f"every size of {self} must be at least 1")
        if self.strip_cols % self.dim:
            raise ValueError(f"strip_cols={self.strip_cols} must be a multiple of dim={self.dim}")

    @property
    def row_strips(self) -> int:
        return -(-self.rows // self.strip_rows)

    @property
    def col_strips(self) -> int:
        return -(-self.cols // self.strip_cols)

    @property
    def padded_rows(self) -> int:
        return self.row_strips * self.strip_rows

    @property
    def padded_cols(self) -> int:
        return self.col_strips * self.strip_cols

    @property
    def num_vectors(self) -> int:
        """Vectors in one row, as stored: padding beyond the last started vector is not."""
        return -(-self.cols // self.dim)

    @property
    def strip_vectors(self) -> int:
        return self.strip_cols // self.dim

    @property
    def axis(self) -> RowAxis:
        """Where the other rows are: nowhere, but for a grid that is a part of one."""
        return ALL_HERE

    @property
    def shared(self) -> bool:
        """Whether these other rows have the same codebooks."""
        return False

    def row_mask(self) -> jax.Array:
        """Rows that are no padding, (G * r,) bool."""
        return jnp.arange(self.padded_rows) < self.rows

    def block_cols(self, block_size: int) -> int:
        """Columns of a lazy block: as many up to `block_size` as tile a strip in whole vectors."""
        blocks = -(-self.strip_cols // max(block_size, self.dim))
        while self.strip_vectors % blocks:
            blocks += 1
        return self.strip_cols // blocks

    def pad_transpose(self, weight: jax.Array) -> jax.Array:
        """(R, C) -> (S * c, G * r), zeros in the padding."""
        pad = ((0, self.padded_cols - self.cols), (0, self.padded_rows - self.rows))
        return jnp.pad(weight.T, pad)

    def unpad_transpose(self, padded: jax.Array) -> jax.Array:
        """(S * c, G * r) -> (R, C)."""
        return padded[: self.cols, : self.rows].T


@dataclasses.dataclass(frozen=True)
class DeviceGrid(GroupGrid):
    """The part of a grid on each device of a mesh, inside `jax.shard_map`; never stored.

    `rows` are those of a device, as many on all of them; what the last ones lack is padding.
    """

    axis_name: str
    whole: GroupGrid

    @property
    def axis(self) -> RowAxis:
        return RowAxis(self.axis_name, self.whole.rows)

    @property
    def shared(self) -> bool:
        return self.whole.row_strips == 1

    def row_mask(self) -> jax.Array:
        return self.axis.used(self.padded_rows)


def over_devices(grid: GroupGrid, devices: int, axis_name: str) -> tuple[DeviceGrid, int]:
    """The grid of each device, and how many of the devices have rows.

    Codebooks are no two devices' where there are several row strips: each device has whole ones.
    Where there is one strip its codebooks are shared, and its rows are spread.

    Args:
      grid: of the layer.
      devices: at most so many.
      axis_name: of the mesh, along which rows lie.
    """
    shared = grid.row_strips == 1
    unit = 1 if shared else grid.strip_rows
    each = _round_up(-(-grid.rows // devices), unit)
    strip_rows = each if shared else grid.strip_rows
    part = DeviceGrid(each, grid.cols, grid.dim, strip_rows, grid.strip_cols, axis_name, grid)
    return part, -(-grid.rows // each)


def make_grid(
    rows: int, cols: int, *, dim: int, group_size: int, max_group_cols: int = 256
) -> GroupGrid:
    """Cuts a matrix so that no more than rows * cols / group_size codebooks are needed.

    The paper shares a codebook among `group_size` weights, at most 256 columns wide (section 4.1).
    Matrices that such groups do not tile are regrouped: strips of equal width first, then as many
    row strips as the number of codebooks allows, of equal height where a divisor is near. A matrix
    smaller than a group has one codebook.

    Args:
      rows, cols: shape of the weight, outputs x inputs.
      dim: D, inputs per vector.
      group_size: weights that share a codebook, at least.
      max_group_cols: widest column strip.
    """
    if group_size < 1 or max_group_cols < dim:
        raise ValueError(f"need {group_size=} >= 1 and {max_group_cols=} >= {dim=}")
    codebooks = max(1, rows * cols // group_size)
    widest = max_group_cols // dim * dim
    col_strips = min(-(-cols // widest), codebooks)
    strip_cols = _round_up(-(-cols // col_strips), dim)
    row_strips = max(1, codebooks // -(-cols // strip_cols))
    # Groups must keep at least group_size weights: too many row strips would overspend the budget.
    row_strips = min(row_strips, rows)
    even = next(n for n in range(row_strips, 0, -1) if rows % n == 0)
    if 2 * even >= row_strips:  # equal strips, unless that costs many codebooks
        row_strips = even
    return GroupGrid(rows, cols, dim, -(-rows // row_strips), strip_cols)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
