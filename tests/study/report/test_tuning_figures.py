"""The report of a run that was tuned as a whole."""

import pytest
from result_files import layer_row, summary_row, tuning_rows, write_run

from gptvq_jax.study.report.report import report
from gptvq_jax.study.report.results import read_results
from gptvq_jax.study.report.tuning_figures import of_tuning, tuning_line


class Axes:
    """What is drawn: {label: points}."""

    def __init__(self):
        self.lines, self.xaxis = {}, self

    def plot(self, x, y, label, **_):
        self.lines[label] = list(zip(x, y, strict=True))

    def get_major_locator(self):
        return self

    def set(self, **_):
        pass

    set_params = set_ylim = set


def drawn(figure):
    axes = Axes()
    figure.draw(axes)
    return axes.lines


def test_loss_and_moves_are_drawn(tmp_path):
    run = write_run(tmp_path / "run", [layer_row(), *tuning_rows(), summary_row()])
    (cell,) = read_results([run]).cells
    loss, moves = map(drawn, of_tuning(cell))
    assert loss["tuned on"] == [(step, 0.6 / step) for step in (1, 2, 3, 4)]
    assert loss["held out"] == [(0, 0.5), (4, 0.25)]
    assert moves == {"row scales": [(0, pytest.approx(0.01)), (1, pytest.approx(0.01))]}
    line = tuning_line(cell)
    assert "4 steps of 2 TFLOP each, 4 s in the median, which is 0.5 TFLOP/s" in line
    assert "0.5000 before, 0.2500 after step 4" in line and "Codes" not in line


def test_codes_that_were_chosen_again_are_drawn_and_counted(tmp_path):
    codes = [
        {"kind": "codes", "step": step, "part": 1.0, "changed": 30 * step, "vectors": 10000}
        | {"held_out_before": 0.25, "held_out_after": after, "kept": after < 0.25, "seconds": 3.0}
        for step, after in ((2, 0.2), (3, 0.3), (4, 0.24))
    ]
    rows = [layer_row(), *tuning_rows(), codes[0], *codes, summary_row()]  # one made again
    (cell,) = read_results([write_run(tmp_path / "run", rows)]).cells
    loss = drawn(of_tuning(cell)[0])
    assert loss["codes, kept"] == [(2, 0.2), (4, 0.24)] and loss["codes, reverted"] == [(3, 0.3)]
    assert (
        "Codes were chosen again in 3 of them and kept in 2: in all 1.8 % of the vectors, and "
        "0.0600 less divergence held out."
    ) in tuning_line(cell)
    rows[-2] = {**codes[2], "kept": 1}
    with pytest.raises(ValueError, match="kept=1 must be true or false"):
        read_results([write_run(tmp_path / "damaged", rows)])


def test_the_page_has_them(tmp_path):
    run = write_run(tmp_path / "run", [layer_row(), *tuning_rows(), summary_row()])
    page = report([run], ask=False).read_text()
    assert "Tuning of the whole model" in page and "4 steps of 2 TFLOP each" in page
    for name in ("tuning_loss", "tuning_moves"):
        assert (run / "report" / "figures" / f"{name}.svg").is_file()


def test_a_run_without_it_has_none(tmp_path):
    run = write_run(tmp_path / "run", [layer_row(), summary_row()])
    (cell,) = read_results([run]).cells
    assert of_tuning(cell) == [] and tuning_line(cell) is None


def test_damaged_rows_are_refused(tmp_path):
    rows = [layer_row(), {"kind": "tune", "step": 1, "loss": "?"}]
    with pytest.raises(ValueError, match="line 2: loss='\\?' must be a number"):
        read_results([write_run(tmp_path / "run", rows)])
