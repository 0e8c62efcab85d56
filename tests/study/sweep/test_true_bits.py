"""Cells of the shipped sweeps that stand beside each other have equal true bits."""

import pytest

from gptvq_jax.console.config_file import load_config
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.methods.trellis import TrellisSettings
from gptvq_jax.run.sizes import packed_bytes
from gptvq_jax.study.sweep.cells import resolve

# Rows and columns of the six layers of SmolLM2-135M.
SHAPES = ((192, 576), (576, 1536), (576, 576), (1536, 576), (192, 576), (576, 576))


def stored_bits(settings, rows, cols):
    """As the README says: codes, and codebooks with a float16 scale each, or AQLM's in float16."""
    if isinstance(settings, TrellisSettings):
        return 8 * settings.budget_bytes(rows, cols)  # met to a few codes
    if isinstance(settings, AQLMSettings):
        books, width, dim = settings.num_codebooks, settings.code_bits, settings.dim
        return books * (rows * cols // dim * width + 2**width * dim * 16) + 16 * rows
    grid = settings.grid(rows, cols)
    of_group = settings.codebook_size * settings.dim * 8 + 16
    codes = rows * cols // settings.dim * settings.index_bits
    return codes + grid.row_strips * grid.col_strips * of_group


def test_stored_bits():
    settings = AQLMSettings(rounds=0)
    assert stored_bits(settings, 16, 64) == 8 * packed_bytes("aqlm", settings, 16, 64)
    settings = GPTVQSettings(bits=1.0, group_size=256, polish_rounds=0)
    assert stored_bits(settings, 16, 64) == 8 * packed_bytes("gptvq", settings, 16, 64)


@pytest.mark.parametrize("arg, windows", [("layers", (6, 8, 10)), ("layers_long", (6, 8, 10, 12))])
def test_true_bits_of_a_row_agree(arg, windows):
    """The cells of the first figure that stand beside each other differ in nothing else."""
    cells, refused = resolve(load_config(f"sweeps/smollm2_dimensionality:{arg}"))[4:6]
    assert [cell.name for cell in refused] == ["4d_3b", "4d_4b"] and "0.2 bits" in refused[0].reason
    values = sum(rows * cols for rows, cols in SHAPES)
    for bits in ("2b", "3b", "4b"):
        row = [cell.settings for cell in cells if cell.point["bits"] == bits]
        assert len(row) == (4 if bits == "2b" else 3) + len(windows)
        trellis = [s.trellis.window_bits for s in row if s.method == "trellis"]
        assert tuple(trellis) == windows
        assert any(isinstance(s.method_settings, AQLMSettings) for s in row)
        true = [sum(stored_bits(s.method_settings, *shape) for shape in SHAPES) for s in row]
        true = [bits / values for bits in true]
        assert max(true) - min(true) <= 0.01, (bits, true)


def test_trellis_codes_of_a_model_have_the_bits_of_the_codebooks():
    """At most those of 1D and 2D, and fewer by 0.015 at most: no row favours them."""
    cells = resolve(load_config("sweeps/smollm2_dimensionality")).cells
    shapes = ((576, 576),) * 2 + ((192, 576),) * 2 + ((1536, 576),) * 2 + ((576, 1536),)
    values = sum(rows * cols for rows, cols in shapes)
    true = {
        cell.name: sum(stored_bits(cell.settings.method_settings, *s) for s in shapes) / values
        for cell in cells
    }
    for bits in ("2b", "3b", "4b"):
        books = [true[f"{dim}_{bits}"] for dim in ("1d", "2d")]
        for window in ("l8", "l10", "l12"):
            assert max(books) - 0.015 <= true[f"{window}_{bits}"] <= min(books)


def test_tokens_are_compared_at_equal_bits():
    resolved = resolve(load_config("sweeps/smollm2_tokens"))
    assert len(resolved.cells) == 8 and not resolved.refused
    values = sum(rows * cols for rows, cols in SHAPES)
    for cell in resolved.cells:
        bits = sum(stored_bits(cell.settings.method_settings, *s) for s in SHAPES) / values
        assert bits == pytest.approx(2.118, abs=5e-4), cell.name
    tokens = {cell.settings.calibration.num_windows for cell in resolved.cells}
    assert tokens == {4, 8, 16, 32}
