"""English Wikipedia articles that the package gensim carries as test data: text without a network.

It is an old dump (2016) of the first articles in alphabetical disorder: about 100 articles.
"""

import bz2
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from gptvq_jax.data.packaged import packaged_file
from gptvq_jax.data.wikitext import clean_markup

DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
_DUMP_FILE = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
_HELD_OUT_EVERY = 5  # every fifth article is test text
_SHORTEST_ARTICLE = 1000  # characters of prose; below are disambiguation pages


def wikipedia_articles(split: str) -> Iterator[str]:
    """Yields cleaned articles, title first, in the order of the dump; parses lazily.

    Args:
      split: "train" or "test"; whole articles, none in both.

    Raises:
      FileNotFoundError: gensim is not installed.
      ValueError: the file in gensim is another one, or the split is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    path = packaged_file("gensim", _DUMP_FILE, DUMP_SHA256)
    for index, (title, markup) in enumerate(read_dump(path)):
        if (index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) == (split == "test"):
            article = clean_markup(title, markup)
            if len(article) >= _SHORTEST_ARTICLE:
                yield article


def read_dump(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (title, markup) of the articles of a MediaWiki XML dump compressed by bzip2.

    Only pages of namespace 0 that are not redirects; one page is in memory at a time.
    """
    with bz2.open(path, "rb") as file:
        for _, element in ElementTree.iterparse(file):
            if not element.tag.endswith("}page"):
                continue
            is_article = element.findtext("{*}ns") == "0"
            if is_article and element.find("{*}redirect") is None:
                markup = element.findtext("{*}revision/{*}text") or ""
                yield element.findtext("{*}title"), markup
            element.clear()
