"""JSON Lines: whole lines are read, a broken last one is not, any other is an error."""

import pytest

from gptvq_jax.console.json_file import read_json_lines


@pytest.mark.parametrize(
    "text, rows",
    [
        ("", []),
        ('{"a": 1}\n{"b": [2]}\n', [{"a": 1}, {"b": [2]}]),
        ('{"a": 1}\n{"b": 2}', [{"a": 1}, {"b": 2}]),
        ('{"a": 1}\n{"b', [{"a": 1}]),
        ('{"a": 1}\n3', [{"a": 1}]),
        ('{"a": "\u2028"}\n', [{"a": "\u2028"}]),  # which str.splitlines splits at
    ],
)
def test_lines(text, rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text(text)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("line", ["", "3", "{", "[" * 100_000, "\udc80"])
def test_a_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f'{{"a": 1}}\n{line}\n'.encode(errors="surrogateescape"))
    message = r"rows.jsonl is damaged: line 2 is no JSON object \(.*\); restore the file"
    with pytest.raises(ValueError, match=message):
        read_json_lines(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_json_lines(tmp_path / "rows.jsonl")
