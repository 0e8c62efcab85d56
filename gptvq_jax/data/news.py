"""News articles that the package gensim carries as test data: held-out text unlike Wikipedia.

About 300 articles of the Australian Broadcasting Corporation (Lee, Pincombe and Welsh, 2005, An
empirical evaluation of models of text document similarity). Nothing in this package was chosen on
them.
"""

from collections.abc import Iterator

from gptvq_jax.data.packaged import packaged_file

NEWS_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
_FILE = "gensim/test/test_data/lee_background.cor"


def news_articles(split: str) -> Iterator[str]:
    """Yields the one text of all articles, one per line.

    Args:
      split: "test".

    Raises:
      FileNotFoundError: gensim is not installed.
      ValueError: the file in gensim is another one, or the split is not "test".
    """
    if split != "test":
        raise ValueError("the corpus 'news' is for evaluation only; calibrate on 'wikipedia'")
    yield packaged_file("gensim", _FILE, NEWS_SHA256).read_text(encoding="utf-8")
