"""Texts by name: local files, and the downloads' protocol (with the network replaced)."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gptvq_jax.data import documents

TEXTS = ["First text.", "Zweiter Text über Öl."]


def test_local_files(tmp_path):
    txt, jsonl, parquet = (tmp_path / f"t{suffix}" for suffix in (".txt", ".jsonl", ".parquet"))
    txt.write_text("\n".join(TEXTS), encoding="utf-8")
    jsonl.write_text(
        '{"text": "First text."}\n\n{"id": 1, "text": "Zweiter Text über Öl."}\n', encoding="utf-8"
    )
    table = pyarrow.table({"text": [TEXTS[0], None, "", TEXTS[1]], "id": [0, 1, 2, 3]})
    pyarrow.parquet.write_table(table, parquet)
    assert list(documents(str(txt), "train")) == ["\n".join(TEXTS)]
    assert list(documents(str(jsonl), "test")) == TEXTS
    assert list(documents(str(parquet), "test")) == TEXTS


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.txt", b"", "t.txt contains no text"),
        ("t.txt", b"\xff\xfe\x00", "t.txt is not UTF-8"),
        ("t.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "t.jsonl line 2 is not a JSON object"),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', "t.jsonl line 2 is not a JSON object"),
        ("t.jsonl", b'["text"]\n', "t.jsonl line 1 is not a JSON object"),
        ("t.parquet", b"PAR1 but not really", "t.parquet is not a complete Parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents(str(tmp_path / name), "train"))


def test_parquet_without_text(tmp_path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    with pytest.raises(ValueError, match=r"no column 'text', only \['body'\]"):
        list(documents(str(path), "train"))


def test_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        documents(str(tmp_path / "absent.txt"), "train")
    with pytest.raises(ValueError, match=r"unknown corpus 'wiki'; name one of .*wikitext2"):
        documents("wiki", "train")
    with pytest.raises(ValueError, match="split must be one of"):
        documents("wikipedia", "validation")


def test_news_is_one_text_for_evaluation_only():
    (text,) = documents("news", "test")
    assert len(text.splitlines()) == 300
    assert text.startswith("Hundreds of people have been forced to vacate their homes")
    with pytest.raises(ValueError, match="'news' is for evaluation only"):
        next(documents("news", "train"))


def test_downloads_follow_the_protocol(monkeypatch):
    calls = []

    def load_dataset(repository, *args, **kwargs):
        calls.append((repository, *args, kwargs))
        column = "sentence" if "ptb" in repository else "text"
        return {column: [f"row {i}" for i in range(1200)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = [f"row {i}" for i in range(1200)]
    assert list(documents("wikitext2", "test")) == ["\n\n".join(rows)]
    assert list(documents("ptb", "test")) == [" ".join(rows)]
    assert list(documents("c4", "train")) == rows
    assert list(documents("c4", "test")) == [" ".join(rows[:1100])]
    assert calls[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"})
    assert calls[1][2]["split"] == "test"
    assert calls[2][1]["data_files"] == "en/c4-train.00000-of-01024.json.gz"
    assert calls[3][1]["data_files"] == "en/c4-validation.00000-of-00008.json.gz"


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_no_network(monkeypatch, name):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"name 'wikipedia' or a local \.txt") as caught:
        documents(name, "test")
    assert "\n" not in str(caught.value)
