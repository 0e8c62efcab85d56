"""Texts by name, and the downloads' protocol (with the network replaced)."""

import datasets
import pytest

from gptvq_jax.data import documents


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


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_no_network(monkeypatch, name):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"name 'wikipedia' or a local \.txt") as caught:
        documents(name, "test")
    assert "\n" not in str(caught.value)
