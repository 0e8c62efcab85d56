"""grid: every weight is in exactly one group, and there are no more groups than asked for."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.grid import GroupGrid, make_grid, over_devices

SHAPES = [(1, 1), (7, 30), (576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)]
SHAPES += [(7, 4096), (4096, 14336), (100, 257), (3, 1000), (13, 1023)]
CASES = [
    (rows, cols, dim, group_size, max_cols)
    for (rows, cols), dim, group_size, max_cols in itertools.product(
        SHAPES, (1, 2, 3, 4), (7, 512, 1792, 65536), (64, 100, 255, 256)
    )
]
CASES += [(1, 70, 4, 6, 7), (2, 30, 2, 5, 5)]  # max_group_cols that dim does not divide


def test_groups_cover_every_weight_once():
    for rows, cols, dim, group_size, max_cols in CASES:
        grid = make_grid(rows, cols, dim=dim, group_size=group_size, max_group_cols=max_cols)
        # The last strip must start inside the matrix (none is empty) and reach its end.
        assert (grid.row_strips - 1) * grid.strip_rows < rows <= grid.padded_rows, grid
        assert (grid.col_strips - 1) * grid.strip_cols < cols <= grid.padded_cols, grid
        assert grid.padded_rows == grid.row_strips * grid.strip_rows
        assert grid.padded_cols == grid.col_strips * grid.strip_cols
        assert grid.strip_cols % dim == 0 and grid.strip_vectors == grid.strip_cols // dim
        assert grid.num_vectors == int(np.ceil(cols / dim))


@pytest.mark.parametrize("devices", [1, 3, 8, 1000])
def test_devices_have_whole_strips_and_none_is_left_out(devices):
    for rows, cols, dim, group_size, max_cols in CASES:
        grid = make_grid(rows, cols, dim=dim, group_size=group_size, max_group_cols=max_cols)
        part, used = over_devices(grid, devices, "devices")
        assert 1 <= used <= devices and (used - 1) * part.rows < rows <= used * part.rows
        assert part.rows == part.padded_rows and part.shared == (grid.row_strips == 1)
        # No device has more than its share, rounded up to whole strips.
        unit = 1 if part.shared else grid.strip_rows
        assert part.rows - unit < rows / devices and part.rows % unit == 0
        if not part.shared:
            assert part.strip_rows == grid.strip_rows
            assert (used - 1) * part.row_strips < grid.row_strips <= used * part.row_strips
        assert (part.cols, part.strip_cols, part.dim) == (cols, grid.strip_cols, dim)
        assert part.axis.rows == rows


def test_no_more_codebooks_than_the_group_size_allows():
    worst = [
        (case, grid.row_strips * grid.col_strips)
        for case in CASES
        for grid in [make_grid(*case[:2], dim=case[2], group_size=case[3], max_group_cols=case[4])]
        if grid.row_strips * grid.col_strips > max(1, case[0] * case[1] // case[3])
    ]
    assert worst == []


def test_strips_are_narrow_when_codebooks_allow_it():
    for rows, cols, dim, group_size, max_cols in CASES:
        grid = make_grid(rows, cols, dim=dim, group_size=group_size, max_group_cols=max_cols)
        narrowest = -(-cols // (max_cols // dim * dim))  # strips if none is wider than max_cols
        if rows * cols // group_size >= narrowest:
            assert grid.strip_cols <= max_cols, grid


def test_smollm_layer_by_hand():
    # 576 columns in 3 strips of 192; 192 * 576 / 1344 = 82 codebooks -> 27 row strips per column
    # strip -> 8 rows each (7 would need 28), i.e. 24 row strips, 72 codebooks of 1536 weights.
    grid = make_grid(192, 576, dim=2, group_size=1344)
    assert grid == GroupGrid(192, 576, 2, strip_rows=8, strip_cols=192)
    assert (grid.row_strips, grid.col_strips) == (24, 3)
    # 576 * 1536 / 1344 = 658 codebooks, 6 strips of 256 -> 109 row strips -> 6 rows -> 96.
    assert make_grid(576, 1536, dim=2, group_size=1344).strip_rows == 6


@pytest.mark.parametrize("rows", [1024, 2048, 4096])
def test_powers_of_two_are_cut_evenly(rows):
    """So that row groups of Llama's layers can be stacked whatever the codebooks cost."""
    for group_size in (2176, 4224, 8320, 16512, 32896):
        grid = make_grid(rows, 4096, dim=2, group_size=group_size)
        assert rows % grid.strip_rows == 0


def test_seven_rows_per_group():
    grid = make_grid(49, 256, dim=2, group_size=7 * 256)
    assert (grid.strip_rows, grid.strip_cols, grid.row_strips, grid.col_strips) == (7, 256, 7, 1)


def test_a_matrix_smaller_than_a_group_has_one_codebook():
    grid = make_grid(3, 10, dim=4, group_size=10**6)
    assert (grid.row_strips, grid.col_strips, grid.strip_cols) == (1, 1, 12)


def test_every_codebook_count_is_spent_well():
    """Shapes that tile exactly waste nothing."""
    grid = make_grid(64, 512, dim=2, group_size=2048)
    assert grid.row_strips * grid.col_strips == 64 * 512 // 2048 == 16


def test_rows_are_cut_evenly_where_that_costs_few_codebooks():
    """No row is padding if some number of equal strips is within a quarter of the most allowed."""
    even = 0
    for rows, cols, dim, group_size, max_cols in CASES:
        grid = make_grid(rows, cols, dim=dim, group_size=group_size, max_group_cols=max_cols)
        codebooks = max(1, rows * cols // group_size)
        most = min(rows, max(1, codebooks // grid.col_strips))
        near = [n for n in range(1, most + 1) if rows % n == 0 and 2 * n >= most]
        if near:
            assert grid.row_strips == max(near) and grid.padded_rows == rows, grid
            even += 1
        else:  # the most strips that the number of codebooks allows, the last one shorter
            assert grid.strip_rows == -(-rows // most), grid
    assert 0 < even < len(CASES)


def test_equal_strips_by_hand():
    # 576 * 576 / 6144 = 54 codebooks, 18 row strips in each of 3 column strips: 32 rows each.
    assert make_grid(576, 576, dim=2, group_size=6144).strip_rows == 32
    # 17 row strips: 16 of 36 rows, not 16 of 34 and one of 32.
    assert make_grid(576, 576, dim=2, group_size=6400).strip_rows == 36
    # 13 rows in at most 6 strips: only 1 divides 13, so 5 strips of 3 rows, the last one of 1.
    grid = make_grid(13, 64, dim=2, group_size=128)
    assert (grid.strip_rows, grid.row_strips, grid.padded_rows) == (3, 5, 15)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_unpad_inverts_pad_and_padding_is_zero(dim):
    grid = GroupGrid(5, 11, dim, strip_rows=2, strip_cols=2 * dim)
    weight = np.arange(1.0, 56).reshape(5, 11)
    padded = np.asarray(grid.pad_transpose(jnp.asarray(weight)))
    assert padded.shape == (grid.padded_cols, grid.padded_rows)
    np.testing.assert_array_equal(padded[:11, :5], weight.T)
    assert padded.sum() == weight.sum()
    np.testing.assert_array_equal(grid.unpad_transpose(padded), weight)


def test_block_cols_is_the_largest_multiple_of_dim_that_tiles_a_strip():
    for dim, vectors, block_size in itertools.product((1, 2, 4), range(1, 40), (1, 2, 7, 32, 500)):
        grid = GroupGrid(4, 3 * vectors * dim, dim, strip_rows=2, strip_cols=vectors * dim)
        allowed = [
            n * dim
            for n in range(1, vectors + 1)
            if vectors % n == 0 and n * dim <= max(block_size, dim)
        ]
        assert grid.block_cols(block_size) == max(allowed), (grid, block_size)


@pytest.mark.parametrize("sizes", [(0, 4, 2, 2, 2), (4, 4, 2, 0, 2), (4, 4, 0, 2, 2)])
def test_sizes_below_one_are_errors(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        GroupGrid(*sizes)


def test_errors_name_the_field():
    with pytest.raises(ValueError, match="strip_cols=3 must be a multiple of dim=2"):
        GroupGrid(4, 6, 2, 2, 3)
    with pytest.raises(ValueError, match="group_size=0"):
        make_grid(4, 4, dim=2, group_size=0)
    with pytest.raises(ValueError, match="max_group_cols=2"):
        make_grid(4, 4, dim=4, group_size=4, max_group_cols=2)
