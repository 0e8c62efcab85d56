# ruff: noqa: RUF001  dashes and quotation marks are meant as they are
"""Packaged Wikipedia articles, and the cleaning of MediaWiki markup."""

import bz2
import importlib.metadata
import itertools
import re
from pathlib import Path

import pytest

from gptvq_jax.data import documents
from gptvq_jax.data.wikipedia import read_dump, wikipedia_articles
from gptvq_jax.data.wikitext import clean_markup

LONG = "This sentence is here to make the paragraph long enough to be kept as prose."


def clean(markup):
    return clean_markup("T", markup).split("\n")[1:]


# --- markup ---


@pytest.mark.parametrize(
    "markup, expected",
    [
        ("'''Bold''', ''italic'' and '''''both'''''.", "Bold, italic and both."),
        ("A [[link]], a [[Target|label]] and [[:Category:Shown|one]].", "A link, a label and one."),
        ("Cited.<ref name=a>{{cite web|url=http://x.y}}</ref><ref name=a/> On.", "Cited. On."),
        ("Doubted{{citation needed|date=May 2015}}.", "Doubted."),
        ("Said<!-- never --> aloud.", "Said aloud."),
        ("[[File:a.jpg|thumb|A [[nested]] caption.]]Text.", "Text."),
        ("An [http://a.b outer link] [http://a.b].", "An outer link."),
        ("From 4&nbsp;to&ndash;5 &amp; on.", "From 4 to–5 & on."),
        ("Plato ({{IPAc-en|p|l|eɪ}}; {{lang-grc|Πλάτων}}, born 428) taught.",
         "Plato (born 428) taught."),
        ("Albania ({{lang-sq|Shqipëri}}) is.", "Albania is."),
        ("The word {{lang|fr|''mot''}} is French.", "The word mot is French."),
        ("It is {{convert|4|to|5|km|mi}} long.", "It is 4 to 5 km long."),
        ("It covers {{convert|7|sqmi|km2|abbr=on}}.", "It covers 7 square miles."),
        ("H<sub>2</sub>O and the 5<small>th</small>.", "H2O and the 5th."),
    ],
)  # fmt: skip
def test_inline_markup(markup, expected):
    assert clean(f"{LONG} {markup}") == [f"{LONG} {expected}"]


@pytest.mark.parametrize(
    "markup",
    [
        "The energy is <math>E = mc^2</math> here. " + LONG,
        "Some 10<sup>6</sup> of them. " + LONG,
        "A {{template nobody knows|1}} inside. " + LONG,
        "[[Category:Things]]",
        "{{Infobox\n| a = " + LONG + "\n}}",
        "{| class=wikitable\n|-\n| cell one. || cell two.\n|}",
        "* short item",
        "Too short.",
        "A line without an end, as captions and titles are, which is long enough otherwise",
        "; term : " + LONG.lower(),
        "<gallery>\nFile:a.jpg|" + LONG + "\n</gallery>",
        "__NOTOC__",
        "#REDIRECT [[Elsewhere]]",
    ],
)
def test_left_out(markup):
    assert clean(f"{LONG}\n\n{markup}\n\n{LONG}") == [LONG, LONG]


def test_box_on_the_line_of_a_paragraph():
    assert clean("{{Infobox\n| name = value\n}}" + LONG) == [LONG]


def test_sections():
    markup = (
        f"{LONG}\n== One ==\n=== Empty ===\n=== Full ===\n* {LONG}\n== See also ==\n{LONG}\n"
        f"=== Inside it ===\n{LONG}\n== Bare ==\n== ''Two'' ==\n{LONG}\n==References==\n{LONG}"
    )
    expected = f"= T =\n{LONG}\n\n== One ==\n\n=== Full ===\n{LONG}\n\n== Two ==\n{LONG}"
    assert clean_markup("T", markup) == expected


# --- the dump ---

PAGE = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"


def test_read_dump(tmp_path):
    pages = [("A", 0, "", "x"), ("R", 0, '<redirect title="A" />', "y"), ("W:B", 4, "", "z")]
    body = "".join(PAGE.format(*page) for page in [*pages, ("C", 0, "", "&lt;b&gt;")])
    path = tmp_path / "dump.bz2"
    path.write_bytes(bz2.compress(f'<mediawiki xmlns="http://m.org/">{body}</mediawiki>'.encode()))
    assert list(read_dump(path)) == [("A", "x"), ("C", "<b>")]


@pytest.mark.slow
def test_splits_do_not_overlap(wikipedia):
    train, test = wikipedia["train"], wikipedia["test"]
    assert (len(train), len(test)) == (76, 18)
    titles = [article.split("\n")[0] for article in (*train, *test)]
    assert len(set(titles)) == len(titles)
    # No paragraph is in both either.
    paragraphs = [
        {line for a in split for line in a.split("\n") if line} for split in (train, test)
    ]
    headings = {line for line in paragraphs[0] & paragraphs[1] if line.startswith("=")}
    assert paragraphs[0] & paragraphs[1] == headings


@pytest.mark.slow
def test_articles_are_clean(wikipedia):
    articles = wikipedia["train"] + wikipedia["test"]
    text = "\n\n".join(articles)
    assert len(text) > 2_000_000
    for mark in ("{{", "}}", "[[", "]]", "<ref", "</", "{|", "|}", "''", "&nbsp;", "  ", "\x00",
                 "http://", "\t", "\u00a0", " ,", "( ", "()"):  # fmt: skip
        assert mark not in text, mark
    heading = re.compile(r"(=+) [^=].* \1")
    for article in articles:
        first, *lines = article.split("\n")
        assert re.fullmatch(r"= .+ =", first)
        for line in filter(None, lines):
            assert re.search(r"[.!?…][\"'”’)]*$", line[-9:]) or heading.fullmatch(line), line
    anarchism = next(article for article in articles if article.startswith("= Anarchism ="))
    assert anarchism.split("\n")[1].startswith("Anarchism is a political philosophy that advocates")


@pytest.mark.slow
def test_articles_are_lazy_and_deterministic(wikipedia):
    again = list(itertools.islice(documents("wikipedia", "test"), 2))
    assert again == wikipedia["test"][:2]


def test_packaged_errors(monkeypatch):
    with pytest.raises(ValueError, match="split must be"):
        list(wikipedia_articles("validation"))

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    lines = (Path(__file__).parents[2] / "requirements-demo.txt").read_text().splitlines()
    demo = " ".join(line for line in lines if not line.startswith("#"))
    message = f"gensim is not installed; run: pip install --no-deps {demo}$"
    with pytest.raises(FileNotFoundError, match=message):
        list(documents("wikipedia", "train"))
