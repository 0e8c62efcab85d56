"""Settings that differ, and the curves that cells belong to."""

from pathlib import Path

from result_files import config, layer_row

from gptvq_jax.config import flat
from gptvq_jax.study.report.results import Cell
from gptvq_jax.study.report.settings import code_name, common, curve_names, differing


def cell(name="a", layers=(), **fields):
    return Cell(name, Path(name), "done", settings=flat(config(**fields)), layers=layers)


def test_what_differs_and_what_is_shared():
    cells = [
        cell("a", **{"vq.dim": 1, "damping": 0.1}),
        cell("b", **{"vq.dim": 2, "damping": 0.1, "seed": 3}),
    ]
    assert differing(cells) == ["seed", "vq.dim"]
    assert common(cells) == {"damping": "0.1"}
    assert common(cells[1:]) == {"damping": "0.1", "seed": "3"}


def test_a_cell_that_never_began_has_the_fields_of_its_axes_alone():
    waiting = Cell("c", Path("c"), "not finished", settings={"vq.dim": 8})
    assert differing([cell("a", **{"vq.dim": 1}), waiting]) == ["vq.dim"]


def test_names_of_codes():
    assert code_name(cell(**{"vq.dim": 4, "vq.bits": 2.0})) == "GPTVQ 4D"
    assert code_name(cell(method="gptq")) == "GPTQ"
    assert code_name(cell(method="aqlm", **{"aqlm.dim": 16})) == "AQLM 16D"
    assert code_name(cell(layers=[layer_row(dim=1), layer_row(dim=2)])) == "GPTVQ mixed"
    assert code_name(Cell("a", Path("a"), "done")) == "GPTVQ"


def test_a_curve_goes_along_bits_and_nothing_else():
    cells = [
        cell("a", **{"vq.bits": 2.0, "vq.group_size": 256}),
        cell("b", **{"vq.bits": 3.0}),
        cell("c", **{"vq.dim": 1}),
        cell("d", **{"tune.block": True}),
        cell("e", **{"allocation.bits_per_value": 2.5}),
    ]
    names = curve_names(cells)
    assert names["a"] == names["b"] == "GPTVQ 2D, tune.block=false"
    assert names["c"] == "GPTVQ 1D, tune.block=false"
    assert names["d"] == "GPTVQ 2D, tune.block=true"
    assert names["e"] == "GPTVQ 2D, bits by layer, tune.block=false"
    assert curve_names(cells[:3])["c"] == "GPTVQ 1D"
