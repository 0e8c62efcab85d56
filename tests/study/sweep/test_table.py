"""What a sweep shows while it runs, and its results as a table."""

import csv
import io

from gptvq_jax.study.sweep.results import as_csv
from gptvq_jax.study.sweep.table import Table


def test_the_table_in_a_log_has_a_line_for_every_change(capsys):
    done = {"status": "done", "bits_per_value": 2.5, "perplexity_quantized": "inf", "seconds": 3.0}
    with Table("models", ["a", "bb"], terminal=False) as table:
        table.started("a", "float")
        table.started("a", "float")
        table.elsewhere("bb")
        assert table.ended("a", done) and not table.ended("a", done)
        assert table.ended("bb", {"status": "failed", "error": "no room"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["cell", "state", "bits/value", "perplexity", "seconds"],
        ["a", "float"],
        ["bb", "elsewhere"],
        ["a", "done", "2.5000", "inf", "3.0"],
        ["bb", "failed", "no", "room"],
    ]
    assert table.text().splitlines()[1:] == lines[3:]


def test_the_table_on_a_terminal_changes_its_lines(capsys):
    with Table("layers", ["a", "b"], terminal=True) as table:
        table.started("b", "running")
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [table.header] and "SQNR dB" in table.header
    assert "b     running" in captured.err and "\r" in captured.err
    assert "a     waiting" in captured.err


def test_csv_has_a_column_for_each_number_of_any_row():
    rows = [
        {"cell": "a", "status": "done", "seconds": 1.5, "stages": {"load": {"seconds": 1}}},
        {"cell": "b, c", "status": "failed", "error": "no\nroom", "layers": [{"x": 1}]},
    ]
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["cell"] for row in read] == ["a", "b, c"]
    assert read[0]["stages.load.seconds"] == "1" and read[1]["error"] == "no\nroom"
    assert "layers" not in read[0] and list(read[0])[:3] == ["cell", "status", "seconds"]
