"""Runs and sweeps are read as they are, and what is wrong with them is one line."""

import json

import pytest
from result_files import (
    PROTOCOL,
    comparison,
    dimensions,
    layer_row,
    summary_row,
    write_lines,
    write_run,
    write_sweep,
)

from gptvq_jax.study.report.results import read_results

INF = float("inf")


def test_a_run(tmp_path):
    rows = [layer_row(0), layer_row(1), summary_row(comparison=comparison(0.25))]
    run = write_run(tmp_path / "mine", rows, {"vq.dim": 4, "vq.bits": 2.0})
    (run / "command.txt").write_text("python scripts/quantize.py --config=x.py\n")
    (cell,), notes = read_results([run])
    assert notes == [] and (cell.name, cell.status) == ("mine", "done")
    assert cell.command == "python scripts/quantize.py --config=x.py"
    assert (cell.settings["vq.dim"], len(cell.layers)) == (4, 2)
    assert (cell.number("perplexity_quantized"), cell.number("kl_mean")) == (20.0, 0.25)
    assert (cell.standard_error("kl_mean"), cell.standard_error("perplexity")) == (0.001, None)


def test_numbers_that_json_does_not_have(tmp_path):
    rows = [layer_row(error="inf"), summary_row("inf", comparison=comparison("nan", None))]
    (cell,), _ = read_results([write_run(tmp_path / "w", rows)])
    assert cell.number("perplexity_quantized") == cell.layers[0]["relative_error"] == INF
    assert str(cell.number("kl_mean")) == "nan"


def test_a_sweep(tmp_path):
    cells, notes = read_results([dimensions(tmp_path / "s")])
    assert [cell.name for cell in cells] == ["1d_2b", "1d_3b", "2d_2b", "2d_3b", "8d"]
    assert [cell.status for cell in cells] == ["done"] * 4 + ["failed"]
    assert notes == ["1 of 5 cells failed: 8d (vq.dim=8 must be 1, 2 or 4)"]
    assert cells[1].command == "python scripts/sweep.py --cells=1d_3b"
    assert cells[1].settings["vq.bits"] == 3.0 and len(cells[1].layers) == 6
    assert cells[4].error == "vq.dim=8 must be 1, 2 or 4" and cells[4].settings == {"vq.dim": 8}


def test_a_cell_that_was_run_again_has_the_last_word(tmp_path):
    rows = [
        {"cell": "a", "status": "failed", "error": "no room"},
        {"cell": "a", **summary_row(21.0)},
    ]
    refused = [{"name": "b", "reason": "codes have 8 bits"}]
    sweep = write_sweep(tmp_path / "s", {"a": {}, "c": {}}, rows, refused=refused)
    (again, waiting), notes = read_results([sweep])
    assert (again.status, again.error, again.number("perplexity_quantized")) == ("done", "", 21.0)
    assert waiting.status == "not finished" and notes[0] == "b was refused: codes have 8 bits"
    assert notes[1:] == ["1 of 2 cells is not finished: c"]


def test_layers_of_a_sweep_over_layers(tmp_path):
    layers = [{"layer": "0_up", "relative_error": 0.01, "bits_per_value": 2.0, "seconds": 1.0}]
    row = {"cell": "a", "bits_per_value": 2.0, "relative_error": 0.01, "layers": layers}
    (cell,), _ = read_results([write_sweep(tmp_path, {"a": {"vq.dim": 2}}, [row], "layers")])
    assert cell.layers == layers and cell.number("perplexity_quantized") is None


def test_a_cell_without_a_config_has_the_settings_of_its_sweep(tmp_path):
    sweep = write_sweep(tmp_path, {"a": {"vq.dim": 4}}, [{"cell": "a", **summary_row()}])
    record = json.loads((sweep / "sweep.json").read_text())
    record["base"] = {"method": "gptvq", "vq": {"dim": 2, "bits": 3.0}}
    (sweep / "sweep.json").write_text(json.dumps(record))
    (cell,), _ = read_results([sweep])
    assert cell.settings == {"method": "gptvq", "vq.dim": 4, "vq.bits": 3.0}
    (sweep / "sweep.json").write_text(json.dumps({**record, "base": [1]}))
    with pytest.raises(ValueError, match=r"base=\[1\] is no object; restore the file"):
        read_results([sweep])


def test_several_directories_have_names_of_their_own(tmp_path):
    runs = [write_run(tmp_path / f"{n}/w", [summary_row()]) for n in "ab"]
    cells, _ = read_results([*runs, dimensions(tmp_path / "s")])
    names = [cell.name for cell in cells]
    assert names[:3] == [str(runs[0]), str(runs[1]), "s/1d_2b"] and len(names) == 7


def test_a_line_that_breaks_off_is_left_out(tmp_path):
    run = write_run(tmp_path / "w", [layer_row(0)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "layer", "blo')
    (cell,), notes = read_results([run])
    assert len(cell.layers) == 1 and notes == ["w is not finished: what it lacks is left out"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "w is neither the work directory of a run nor of a sweep: it has no metrics.jsonl"),
        ({"config.json": "{}"}, "nothing is finished in .*w yet; give the command that began it"),
        ({"metrics.jsonl": ""}, "nothing is finished in"),
        ({"metrics.jsonl": "{}\n"}, "metrics.jsonl, line 1: kind=None is none of layer, block"),
        ({"metrics.jsonl": "\x00\n{}\n"}, "metrics.jsonl is damaged: line 1 is no JSON object"),
        ({"metrics.jsonl": '{"kind": "layer"}\n'}, "line 1: block=None must be a whole number"),
        (
            {"metrics.jsonl": json.dumps(layer_row(error="small")) + "\n"},
            "line 1: relative_error='small' must be a number; restore the file",
        ),
        (
            {"metrics.jsonl": json.dumps(summary_row(stages=[3])) + "\n"},
            r"line 1: stages=\[3\] is no object",
        ),
        (
            {"metrics.jsonl": json.dumps(summary_row(comparison={"kl_mean": {}})) + "\n"},
            "line 1: value=None must be a number",
        ),
        (
            {"metrics.jsonl": json.dumps(summary_row(protocol={"dataset": "a"})) + "\n"},
            "line 1: split=None must be a text; restore the file",
        ),
        (
            {"metrics.jsonl": json.dumps(summary_row(protocol={**PROTOCOL, "joiner": 3})) + "\n"},
            "line 1: joiner=3 must be a text; restore the file",
        ),
        ({"metrics.jsonl": "", "config.json": "["}, "config.json is not valid JSON"),
        ({"sweep.json": "{}"}, "sweep.json lists no cells; restore the file"),
        ({"sweep.json": '{"cells": [{"name": 3}]}'}, "has a cell without a name or a directory"),
        (
            {"sweep.json": '{"cells": [{"name": "a", "workdir": "../b"}]}'},
            "has a cell without a name or a directory in it",
        ),
        (
            {"sweep.json": '{"cells": [{"name": "a", "point": []}], "refused": [1]}'},
            "has a refused cell without a name",
        ),
        ({"sweep.json": '{"cells": [{"name": "a", "fields": [1]}]}'}, "fields of cell 'a' is no"),
        (
            {"sweep.json": '{"cells": []}', "results.jsonl": '{"cell": "a", "status": "?"}\n'},
            "results.jsonl, line 1: status='\\?' is neither done nor failed",
        ),
        (
            {
                "sweep.json": '{"cells": [{"name": "a"}]}',
                "results.jsonl": '{"cell": "a", "status": "failed", "error": "no room"}\n',
            },
            r"nothing is finished in .* yet \(a failed: no room\)",
        ),
    ],
)
def test_bad_input_is_one_line(files, message, tmp_path):
    for name, text in files.items():
        write_lines(tmp_path / "w" / name, [])
        (tmp_path / "w" / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_results([tmp_path / "w"])
    assert "\n" not in str(error.value) and str(tmp_path / "w") in str(error.value)
