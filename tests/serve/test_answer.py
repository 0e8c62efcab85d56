"""Text from tokens as they come: stop strings, characters of several tokens, offsets."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_run import byte_tokenizer

from gptvq_jax.serve.answer import Answer, StopStrings
from gptvq_jax.serve.requests import TokenScore

SCORE = TokenScore(-1.0, [])


def cut(text, strings):
    at = min((text.find(s) for s in strings if s in text), default=len(text))
    return text[:at]


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None)
@example(pieces=["ab", "a"], strings=["b", "aba"])  # ends before the longer one is there
def test_a_text_in_pieces_ends_with_the_first_that_brings_a_string(pieces, strings):
    """And is cut as the whole of these pieces is; what comes later is no part of it."""
    stop, shown, text = StopStrings(strings), "", ""
    for piece in pieces:
        text += "" if stop.found else piece
        shown += stop.add(piece)
        assert stop.found == any(s in text for s in strings)
        assert cut(text, strings).startswith(shown)
    assert shown + stop.finish() == cut(text, strings)


def test_only_what_may_begin_a_string_is_held_back():
    stop = StopStrings(["abc", "xx"])
    assert [stop.add(t) for t in ("1a", "b", "d", "x", "abx", "x!")] == [
        "1",
        "",
        "abd",
        "",
        "xab",
        "",
    ]
    assert stop.found and stop.add("more") == "" == stop.finish()


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def answer(tokenizer, text, stop=(), end="stop", scored=True):
    """Pieces, for the bytes of a text one by one."""
    pieces = []
    listener = Answer(tokenizer, tokenizer("q")["input_ids"], stop, pieces.append)
    for token in tokenizer(text)["input_ids"]:
        if listener.on_token(token, SCORE if scored else None):
            break
    listener.on_end(end)
    assert [piece.end for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].end == end
    return listener, pieces


def test_whole_characters_with_the_tokens_that_make_them(tokenizer):
    listener, pieces = answer(tokenizer, "aé€b")
    assert [piece.text for piece in pieces] == ["a", "é", "€", "b", ""]
    assert [[s.offset for s in piece.scored] for piece in pieces] == [[0], [1, 1], [2] * 3, [3], []]
    assert listener.made == 7


def test_what_did_not_become_a_character_is_shown_at_the_end(tokenizer):
    broken = tokenizer("€")["input_ids"][:2]
    pieces = []
    listener = Answer(tokenizer, (), (), pieces.append)
    for token in broken:
        assert not listener.on_token(token, SCORE)
    assert not pieces
    listener.on_end("length")
    assert pieces[0].text.strip("\ufffd") == "" != pieces[0].text
    assert len(pieces[0].scored) == 2 and pieces[0].end == "length"


def test_tokens_of_a_stop_string_are_not_handed_out(tokenizer):
    listener, pieces = answer(tokenizer, "abcdefg", ["def"])
    assert "".join(piece.text for piece in pieces) == "abc"
    assert [s.offset for piece in pieces for s in piece.scored] == [0, 1, 2]
    assert listener.made == 6
    _, pieces = answer(tokenizer, "abcde", ["def"], "length")
    assert "".join(piece.text for piece in pieces) == "abcde"
    assert len([s for piece in pieces for s in piece.scored]) == 5


def test_without_scores_there_are_only_texts(tokenizer):
    _, pieces = answer(tokenizer, "ab", scored=False)
    assert all(piece.scored == () for piece in pieces)
