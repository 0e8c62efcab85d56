"""What figures show: their points, not their pixels."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure as Canvas
from result_files import LAYERS, comparison, dimensions, layer_row, summary_row

from gptvq_jax.console.plot_style import log_ticks, style
from gptvq_jax.study.report import dimension_figures, layer_figures, quality_figures, time_figures
from gptvq_jax.study.report.drawing import shortened
from gptvq_jax.study.report.pareto import pareto_front
from gptvq_jax.study.report.results import Cell, read_results
from gptvq_jax.study.report.table import cells_table, held_out_error


def drawn(figure):
    """{label: [(x, y), ...]} of the lines of a figure, whose axes must say what they are."""
    axes = Canvas().subplots()
    figure.draw(axes)
    assert axes.get_xlabel() and (axes.get_ylabel() or figure.rows)
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def cell(name, layers=(), settings=None, **summary):
    return Cell(name, Path(name), "done", settings=settings or {}, layers=layers, summary=summary)


@pytest.fixture
def sweep(tmp_path):
    return [c for c in read_results([dimensions(tmp_path / "s")]).cells if c.status == "done"]


CUT = "\N{HORIZONTAL ELLIPSIS}"
NUMBERS = st.integers(0, 6).map(float)


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_the_pareto_front_by_brute_force(points):
    def beaten(point):
        return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)

    front = pareto_front(points)
    assert sorted(front) == [place for place, point in enumerate(points) if not beaten(point)]
    assert [points[place] for place in front] == sorted(points[place] for place in front)


def test_perplexity_against_bits(sweep):
    notes = []
    perplexity, divergence = quality_figures.against_bits(sweep, notes)
    lines = drawn(perplexity)
    assert lines["GPTVQ 1D"] == [[2.125, 21.0], [3.125, 17.0]]
    assert lines["GPTVQ 2D"] == lines["Pareto front"] == [[2.125, 20.0], [3.125, 16.0]]
    assert [y for _, y in lines["float 15"]] == [15.0, 15.0] and notes == []
    assert drawn(divergence)["GPTVQ 2D"] == [[2.125, pytest.approx(0.3)], [3.125, 0.4]]
    assert "one standard error" in divergence.caption and "Bars" not in perplexity.caption


def test_standard_errors_are_bars():
    (cell_,) = [cell("a", **summary_row(comparison=comparison(0.25, 0.05)))]
    axes = Canvas().subplots()
    quality_figures.against_bits([cell_], [])[1].draw(axes)
    (bars,) = axes.containers[0].lines[2]
    np.testing.assert_allclose(bars.get_segments(), [[[2.125, 0.2], [2.125, 0.3]]])
    low, high = axes.get_ylim()
    assert low < 0.2 and high > 0.3


@pytest.mark.parametrize("error, cut", [(0.2, False), (0.24, True), (0.25, True), (9.0, True)])
def test_a_bar_is_whole_or_its_cut_is_marked(error, cut):
    (figure,) = quality_figures.against_bits(
        [cell("a", **summary_row(comparison=comparison(0.25, error)))], []
    )[1:]
    axes = Canvas().subplots()
    figure.draw(axes)
    (bars,) = axes.containers[0].lines[2]
    ((_, low), (_, high)) = bars.get_segments()[0]
    assert high == pytest.approx(0.25 + error) and axes.get_ylim()[1] > high
    assert low == pytest.approx(0.025 if cut else 0.25 - error) and axes.get_ylim()[0] < low
    arrows = [line for line in axes.lines if line.get_marker() == "v"]
    assert [a.get_xydata().tolist() for a in arrows] == ([[[2.125, 0.025]]] if cut else [])
    assert ("An arrow" in figure.caption) == cut


def test_what_is_not_comparable_is_apart(sweep):
    other = cell("other", **summary_row(evaluation="9 x 32 tokens of t.txt"))
    notes = []
    figures = quality_figures.against_bits([*sweep, other], notes)
    assert [figure.name for figure in figures] == [
        "perplexity_bits_1",
        "kl_bits_1",
        "perplexity_bits_2",
    ]
    assert notes == [
        "models or evaluations differ in 2 ways: each has figures of its own",
        "no KL divergences of other: their figure is left out",
    ]


def test_what_has_no_place_on_a_figure_is_said(sweep):
    notes = []
    cells = [*sweep, cell("worst", settings=sweep[0].settings, **summary_row(math.inf))]
    lines = drawn(quality_figures.against_bits(cells, notes)[0])
    assert notes == ["worst: perplexity_quantized=inf has no place on its figure"]
    assert all(math.isfinite(y) for points in lines.values() for _, y in points)
    notes = []
    assert quality_figures.against_bits([cell("a", [layer_row()])], notes) == []
    assert notes == ["no perplexities: the figures against bits per value are left out"]


def test_sqnr_against_dimension(sweep):
    (figure,) = dimension_figures.against_dimension(sweep, [])
    expected = {
        f"{bits + 0.125:.2f} bits": [
            [place, pytest.approx(-10 * math.log10(0.1 / bits**4 / dim))]
            for place, dim in enumerate((1, 2))
        ]
        for bits in (2, 3)
    }
    assert drawn(figure) == expected
    tuned = [
        dataclasses.replace(c, name=f"{c.name} tuned", settings={**c.settings, "tune.block": True})
        for c in sweep
    ]
    (figure,) = dimension_figures.against_dimension([*sweep, *tuned], [])  # lines of their own
    assert drawn(figure) == {
        f"{label}, tune.block={value}": line
        for value in ("false", "true")
        for label, line in expected.items()
    }
    notes = []
    assert dimension_figures.against_dimension(sweep[:2], notes) == []
    assert "no cells of the same layers that differ in dimension" in notes[0]


def test_trellis_codes_are_a_dotted_curve_of_the_bits_of_their_windows():
    def made(name, fields, error):
        fields = {"model": "m", **fields}
        row = layer_row(error=error)
        del row["dim"]
        return cell(name, [row], settings=fields, bits_per_value=2.125)

    windows = [
        made(f"l{bits}", {"method": "trellis", "trellis.window_bits": bits}, 2.0**-bits)
        for bits in (12, 8, 10)
    ]
    books = [made(f"{dim}d", {"method": "gptvq", "vq.dim": dim}, 0.1 / dim) for dim in (2, 1)]
    (figure,) = dimension_figures.against_dimension([*windows, *books], [])
    assert drawn(figure) == {
        "2.12 bits": [
            [place, pytest.approx(10 * math.log10(10 * (place + 1)))] for place in (0, 1)
        ],
        "2.12 bits, trellis": [
            [place, pytest.approx(10 * bits * math.log10(2))]
            for place, bits in ((2, 8), (3, 10), (4, 12))
        ],
    }
    axes = Canvas().subplots()
    figure.draw(axes)
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names[:3] == ["GPTVQ\n1D", "GPTVQ\n2D", "TRELLIS\nL=8"]
    whole, dotted = axes.lines
    assert (whole.get_linestyle(), dotted.get_linestyle()) == ("-", ":")
    assert whole.get_color() == dotted.get_color()
    assert "spans L / K weights" in figure.caption and "bits of a window" in axes.get_xlabel()
    (figure,) = dimension_figures.against_dimension(books, [])
    assert "rellis" not in figure.caption


def test_sqnr_is_a_mean_of_decibels():
    rows = [layer_row(error=error) for error in (0.1, 0.001, 0.0)]  # the last is exact
    assert dimension_figures.sqnr(rows) == pytest.approx(20.0)
    assert dimension_figures.sqnr(rows[2:]) is None


@settings(deadline=None)
@given(st.lists(st.floats(1, 4), min_size=1, max_size=10))
def test_groups_of_equal_bits(bits):
    cells = [cell(str(i), bits_per_value=b) for i, b in enumerate(bits)]
    groups = dimension_figures.equal_bits(cells)
    assert sorted(c.name for group in groups for c in group) == sorted(c.name for c in cells)
    spans = [[c.number("bits_per_value") for c in group] for group in groups]
    assert all(max(span) - min(span) <= 0.08 for span in spans)
    assert all(min(b) - min(a) > 0.08 for a, b in pairwise(spans))


def test_errors_by_layer_and_by_depth():
    errors = {(0, 0): 0.1, (0, 1): 0.4, (1, 0): 0.001, (1, 1): 0.1}
    rows = [layer_row(block, LAYERS[kind], e) for (block, kind), e in errors.items()]
    by_layer, by_depth = layer_figures.side_by_side([cell("a", rows)], [])
    assert drawn(by_layer)["a"] == [[0, pytest.approx(0.01)], [1, pytest.approx(0.2)]]
    assert drawn(by_depth)["a"] == [[0, pytest.approx(0.2)], [1, pytest.approx(0.01)]]


def test_one_run_by_depth():
    rows = [
        layer_row(
            block, name, 0.1 * (block + 1), 2.0 + block, unused_centroids=2 * block, dim=1 + block
        )
        for block in range(2)
        for name in LAYERS
    ]
    tuned = [{"block": 0, "tune_error_before": 0.2, "tune_error_after": 0.1}]
    run = Cell("a", Path("a"), "done", layers=rows, blocks=tuned)
    error, bits, unused, tuning = layer_figures.of_one(run, "x_")
    assert drawn(error) == {name: [[0, 0.1], [1, 0.2]] for name in LAYERS}
    assert drawn(bits) == {name: [[0, 2.0], [1, 3.0]] for name in LAYERS}
    assert drawn(unused) == {name: [[0, 0], [1, 2]] for name in LAYERS}
    axes = Canvas().subplots()
    unused.draw(axes)
    assert all(tick == round(tick) for tick in axes.get_yticks())
    assert layer_figures.unused_line(run) is None
    assert drawn(tuning) == {"quantized": [[0, 0.2]], "and tuned": [[0, 0.1]]}
    plain = Cell("a", Path("a"), "done", layers=[layer_row()])
    assert [figure.name for figure in layer_figures.of_one(plain, "")] == ["error"]
    assert layer_figures.unused_line(plain) == "Every centroid is used."


def test_experts_of_a_block_share_a_line():
    rows = [
        layer_row(block, f"mlp/experts_{e}/up_proj", 0.1 * (e + 1), expert_tokens=e)
        for block in range(2)
        for e in range(3)
    ]
    for row in rows[:2]:
        row["shared_hessian"] = 0.5
    run = Cell("a", Path("a"), "done", layers=rows)
    (error,) = layer_figures.of_one(run, "")
    mean = pytest.approx(0.2)
    assert drawn(error) == {"mlp/experts/up_proj": [[0, mean], [1, mean]]}
    by_layer, _ = layer_figures.side_by_side([run], [])
    assert drawn(by_layer)["a"] == [[0, pytest.approx(0.006 ** (1 / 3))]]
    line = layer_figures.experts_line(run)
    assert line.startswith("2 of 6 layers of experts got too few") and "1 of them none" in line
    assert layer_figures.experts_line(Cell("a", Path("a"), "done", layers=rows[2:])) is None


def test_held_out_errors_have_a_figure_and_a_column():
    rows = [layer_row(b, n, 0.01, held_out_error=0.04 * (b + 1)) for b in (0, 1) for n in LAYERS]
    error, held_out = layer_figures.of_one(cell("one", rows), "")
    assert drawn(error) == {name: [[0, 0.01], [1, 0.01]] for name in LAYERS}
    assert drawn(held_out) == {name: [[0, 0.04], [1, 0.08]] for name in LAYERS}
    assert held_out_error(cell("one", rows)) == pytest.approx(0.04 * 2**0.5)
    assert ">0.04</td>" in cells_table([cell("one", rows[:1])])
    of_old = cell("old", [*rows[:1], layer_row()])
    assert held_out_error(of_old) is None and "held-out error" not in cells_table([of_old])


def test_code_usage():
    notes = []
    rows = [layer_row(index_bits=4, code_entropy=3.5), layer_row(index_bits=6, code_entropy=5.0)]
    cells = [cell("a", rows), cell("old", [layer_row()])]
    (figure,) = layer_figures.code_usage(cells, notes)
    lines = drawn(figure)
    assert lines["a"] == [[4, 3.5], [6, 5.0]]
    (both,) = layer_figures.code_usage([cell("a", rows), cell("b", rows)], [])
    assert drawn(both)["a"] == drawn(both)["b"] == lines["a"]  # none beyond its index bits
    assert all(x == y for x, y in lines["all codes as often"])
    assert notes == ["no code entropy in old: it is left out of code usage"]


def test_time_by_stage():
    axes = Canvas().subplots()
    (figure,) = time_figures.time_by_stage([cell("a", **summary_row(resumed_at=2))], [])
    figure.draw(axes)
    assert [bar.get_width() for bar in axes.patches] == [3.5, 1.25, 0.5]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "quantize",
        "evaluate",
        "elsewhere",
    ]
    assert (
        "the last part alone counts: a." in figure.caption and "On a processor." in figure.caption
    )
    several = [cell(name, **summary_row()) for name in "ab"]
    assert drawn(time_figures.time_by_stage(several, [])[0])["b"] == [[3.5, 0], [1.25, 1], [0.5, 2]]
    notes = []
    assert time_figures.time_by_stage([cell("a")], notes) == []
    assert notes == ["no times of stages: time by stage is left out"]


@settings(deadline=None)
@given(st.lists(st.text("ab_", max_size=30), max_size=12, unique=True))
def test_short_names_still_differ(names):
    short = shortened(names, 9)
    assert len(set(short)) == len(names) and all(len(name) <= 9 for name in short)


def test_short_names_keep_what_differs():
    assert shortened(["ab", "cd"], 4) == ["ab", "cd"]
    assert shortened(["a_long_name_1d", "a_long_name_2d"], 8) == [f"{CUT}1d", f"{CUT}2d"]
    assert shortened(["one_long_name"], 7) == [f"one{CUT}ame"]


def test_many_lines_keep_apart():
    looks = [style(index) for index in range(42)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 42


@settings(deadline=None, max_examples=40)
@given(st.floats(1e-6, 1e4), st.floats(0, 8))
def test_a_logarithmic_axis_has_numbers(low, decades):
    high = low * 10**decades
    axes = Canvas().subplots()
    axes.set_yscale("log")
    axes.set_ylim(low / 1.1, high * 1.1)
    log_ticks(axes.yaxis, low, high)
    ticks = [tick for tick in axes.yaxis.get_majorticklocs() if low / 1.1 <= tick <= high * 1.1]
    assert 1 <= len(ticks) <= 20 or decades < 0.01
    assert not len(axes.yaxis.get_minorticklocs())
