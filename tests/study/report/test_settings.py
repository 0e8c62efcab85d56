"""Settings that differ, and the curves that cells belong to."""

import dataclasses
from pathlib import Path

from result_files import config, layer_row

from gptvq_jax.config import flat
from gptvq_jax.study.report.results import Cell
from gptvq_jax.study.report.settings import (
    code_name,
    columns,
    common,
    curve_names,
    differing,
    settings_of,
)


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


def test_sections_that_a_method_does_not_take_are_no_settings():
    aqlm = settings_of(cell(method="aqlm"))
    assert "aqlm.dim" in aqlm and not any(n.startswith(("vq.", "uniform.")) for n in aqlm)
    old = Cell("c", Path("c"), "done", settings={"vq.dim": 8, "aqlm.dim": 4})  # of no known method
    assert settings_of(old) == {"vq.dim": "8", "aqlm.dim": "4"}


def test_axes_and_fields_that_say_the_same_are_one_column():
    points = {"a": ("2d", "2b", "x1"), "b": ("dim1", "bits3.0", "x3"), "c": ("aqlm", "2b", "x2")}
    fields = [{"vq.dim": 2, "vq.bits": 2.0}, {"vq.dim": 1, "vq.bits": 3.0}, {"method": "aqlm"}]
    axes = ("code", "bits", "recipe")
    cells = [
        dataclasses.replace(cell(n, **f), point=dict(zip(axes, p, strict=True)))
        for (n, p), f in zip(points.items(), fields, strict=True)
    ]
    assert columns(cells) == (list(axes), ["method"])  # axes say more
    assert columns(cells[:2]) == (["recipe"], ["vq.dim", "vq.bits"])
    assert columns([cells[0], cell("run", **fields[1])])[1] == ["vq.dim", "vq.bits"]


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
