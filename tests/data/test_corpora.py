"""Texts by name, and the downloads' protocol (with the network replaced)."""

import datasets
import pytest

from gptvq_jax.data import documents
from gptvq_jax.data.corpora import held_out
from gptvq_jax.data.windows import evaluation_windows


def test_unknown_names():
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


class Letters:
    """A tokenizer of one id for each character."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    "name, split", [("wikitext2", "test"), ("c4", "validation"), ("ptb", "test")]
)
def test_what_is_said_of_held_out_text_is_what_is_evaluated(monkeypatch, name, split):
    def load_dataset(repository, *args, data_files="", split, **kwargs):
        column = "sentence" if "ptb" in repository else "text"
        return {column: [f"{data_files}{split}", "second"]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = held_out(name)
    text = "".join(map(chr, evaluation_windows(Letters(), documents(name, "test"), 1)[:, 0]))
    first, second = text.split(said["joiner"])
    assert said["split"] == split and split in first and second == "second"


def test_what_is_said_of_local_and_packaged_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert held_out(str(tmp_path / "a.txt")) == {"split": "whole file", "joiner": None}
    said = held_out(str(tmp_path / "a.jsonl"))
    for name in ("a.txt", "a.jsonl"):
        windows = evaluation_windows(Letters(), documents(str(tmp_path / name), "test"), 8)
        assert "".join(map(chr, windows[0])) == f"one{said['joiner']}two"
    assert held_out("news") == {"split": "test", "joiner": "\n"}
    assert held_out("wikipedia") == {"split": "test", "joiner": "\n\n"}


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_no_network(monkeypatch, name):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"name 'wikipedia' or a local \.txt") as caught:
        documents(name, "test")
    assert "\n" not in str(caught.value)
