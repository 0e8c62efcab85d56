"""Texts by name: the corpora of the GPTQ and GPTVQ papers, packaged Wikipedia, local files.

Each corpus keeps the papers' protocol, so that perplexities compare:
  wikitext2: WikiText-2 raw; the lines of a split joined by a blank line into one text.
  c4: the first shard of the English training split, one document per web page; the test text is
    the first 1100 pages of the first validation shard joined by spaces (GPTQ's "c4-new").
  ptb: Penn Treebank; the sentences of a split joined by spaces (GPTQ's "ptb-new").
  wikipedia: articles that the package gensim carries; every fifth one is held out for "test".
  news: articles that the package gensim carries, all of them "test".
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptvq_jax.console.errors import first_line
from gptvq_jax.data.local_files import READERS, check_file
from gptvq_jax.data.news import news_articles
from gptvq_jax.data.wikipedia import wikipedia_articles
from gptvq_jax.data.windows import SEPARATOR

SPLITS = ("train", "test")
_C4_TEST_PAGES = 1100


def documents(name: str, split: str) -> Iterator[str]:
    """Yields the texts of a corpus, lazily where that saves time.

    Args:
      name: "wikipedia", "news", "wikitext2", "c4", "ptb", or a local file: .txt (one document),
        .jsonl (field "text" of each line) or .parquet (column "text").
      split: "train" for calibration or "test" for evaluation. A local file is one split: name
        different files for the two.

    Raises:
      FileNotFoundError: no such file, or the package that carries the corpus is not installed.
      ValueError: unknown name or split, no text in the file or what is not Unicode text, with its
        line; no network for a download.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if name in _PACKAGED:
        return _PACKAGED[name](split)
    if name in _DOWNLOADS:
        return iter(_DOWNLOADS[name](split))
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() not in READERS:
        known = [*_PACKAGED, *_DOWNLOADS]
        raise ValueError(
            f"unknown corpus {name!r}; name one of {known} or a file in {tuple(READERS)}"
        )
    check_file(path)
    return _non_empty(READERS[path.suffix.lower()](path), path)


def held_out(name: str) -> dict[str, str | None]:
    """What the split "test" of a corpus is, for those who compare figures measured on it.

    Args:
      name: as for `documents`.

    Returns:
      "split", by the name that the corpus gives it, or "whole file"; c4's is its beginning, as the
      docstring of this module says. "joiner", what stands between the lines, sentences, articles or
      pages of the text; None where a file is one text.
    """
    if name in _HELD_OUT:
        split, joiner = _HELD_OUT[name]
    else:
        one = Path(name).suffix.lower() == ".txt"
        split, joiner = "whole file", None if one else SEPARATOR
    return {"split": split, "joiner": joiner}


def _non_empty(texts: Iterator[str], path: Path) -> Iterator[str]:
    found = False
    for text in texts:
        if text.strip():
            found = True
            yield text
    if not found:
        raise ValueError(f"{path} contains no text")


def _wikitext2(split: str) -> list[str]:
    return ["\n\n".join(_download("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])]


def _c4(split: str) -> list[str]:
    shard = "train.00000-of-01024" if split == "train" else "validation.00000-of-00008"
    pages = _download("allenai/c4", data_files=f"en/c4-{shard}.json.gz", split="train")["text"]
    return pages if split == "train" else [" ".join(pages[:_C4_TEST_PAGES])]


def _ptb(split: str) -> list[str]:
    # The repository itself holds a loading script, which datasets no longer runs.
    rows = _download(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        revision="refs/convert/parquet",
        split=split,
    )
    return [" ".join(rows["sentence"])]


_PACKAGED = {"wikipedia": wikipedia_articles, "news": news_articles}
_DOWNLOADS: dict[str, Callable[[str], list[str]]] = {
    "wikitext2": _wikitext2,
    "c4": _c4,
    "ptb": _ptb,
}

_HELD_OUT = {
    "wikipedia": ("test", SEPARATOR),
    "news": ("test", "\n"),
    "wikitext2": ("test", "\n\n"),
    "c4": ("validation", " "),
    "ptb": ("test", " "),
}


def _download(repository: str, *args: Any, **kwargs: Any) -> Any:
    """Returns `datasets.load_dataset(...)`, from its cache or the Hugging Face hub."""
    # Imported here: it is slow, and packaged and local text do not need it.
    import datasets

    try:
        return datasets.load_dataset(repository, *args, **kwargs)
    except Exception as error:  # its HTTP client's exceptions share no public base class
        reason = first_line(error)
        raise ValueError(
            f"cannot get {repository} from the Hugging Face hub; name 'wikipedia' or a local "
            f".txt, .jsonl or .parquet file instead ({reason})"
        ) from None
