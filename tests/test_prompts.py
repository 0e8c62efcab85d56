"""Prompts to tokens, tokens to text piece by piece."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline.conftest import byte_tokenizer

from gptvq_jax.prompts import TextStream, encode_prompts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BYTES = byte_tokenizer()  # a token for each byte


def byte_tokens(data: bytes) -> list[int]:
    """Ids of bytes, whether or not they are characters."""
    # A character of latin-1 that is one byte of the text, in the alphabet of byte-level BPE.
    single = {}
    for token, index in BYTES.get_vocab().items():
        single[token] = index
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(other)}
    return [single[alphabet[byte]] for byte in data]


def stream(tokens, sizes):
    """Pieces of a stream that gets so many tokens at a time."""
    texts, pieces, start = TextStream(BYTES), [], 0
    for size in sizes:
        pieces.append(texts.add(tokens[start : start + size]))
        start += size
    pieces.append(texts.add(tokens[start:]))
    return pieces + [texts.finish()]


@given(text=st.text(max_size=30), sizes=st.lists(st.integers(0, 5), max_size=40))
@settings(deadline=None, max_examples=100)
def test_pieces_are_the_text_in_whole_characters(text, sizes):
    pieces = stream(byte_tokens(text.encode()), sizes)
    assert "".join(pieces) == text
    assert pieces[-1] == "" or text.endswith("\ufffd")
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


@given(data=st.binary(max_size=30), sizes=st.lists(st.integers(0, 5), max_size=40))
@settings(deadline=None, max_examples=100)
def test_bytes_that_are_no_text_come_out_as_the_tokenizer_decodes_them(data, sizes):
    tokens = byte_tokens(data)
    assert "".join(stream(tokens, sizes)) == BYTES.decode(tokens)


def test_a_character_waits_for_its_last_byte():
    assert stream(byte_tokens("a\u20acb".encode()), [1] * 5) == ["a", "", "", "\u20ac", "b", "", ""]


def test_context_is_not_shown_but_tells_how_to_decode():
    class Joins:
        """Puts a space before every word but the first, as many tokenizers do."""

        def decode(self, tokens, **_):
            return " ".join(f"w{token}" for token in tokens)

    assert TextStream(Joins()).add([5]) == "w5"
    texts = TextStream(Joins(), context=[3, 4])
    assert [texts.add([5]), texts.add([6, 7]), texts.add([8]), texts.finish()] == [
        " w5",
        " w6 w7",
        " w8",
        "",
    ]


def test_special_tokens_are_not_shown():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    texts = TextStream(tokenizer)
    assert texts.add([*tokenizer("ab")["input_ids"], tokenizer.eos_token_id]) == "ab"


def test_plain_prompts_are_tokenized():
    assert [BYTES.decode(ids) for ids in encode_prompts(BYTES, ["one", "three"])] == [
        "one",
        "three",
    ]


def test_chat_fills_the_template_up_to_the_answer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = encode_prompts(tokenizer, ["hi", "you"], chat=True)
    assert [tokenizer.decode(ids) for ids in prompts] == [
        "<user>hi<assistant>",
        "<user>you<assistant>",
    ]
    (prompt,) = encode_prompts(tokenizer, ["hi"], chat=True, system="Be short.")
    assert tokenizer.decode(prompt) == "<system>Be short.<user>hi<assistant>"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": ["a", " \n"]}, "prompt 1 is empty"),
        ({"prompts": ["a"], "chat": True}, "no chat template; leave out --chat"),
        ({"prompts": ["a"], "system": "Be short."}, "add --chat"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(BYTES, **arguments)
