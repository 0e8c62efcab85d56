"""Prompts to tokens, tokens to text piece by piece."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline.conftest import byte_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gptvq_jax.data.windows import evaluation_windows
from gptvq_jax.prompts import TextStream, encode_prompts
from gptvq_jax.stop_tokens import end_of_turn

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


def test_a_text_that_the_tokenizer_cannot_read():
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="<unk>"))  # which it lacks
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert encode_prompts(tokenizer, ["a"]) == [[0]]
    with pytest.raises(ValueError, match="tokenizer cannot read prompt 1: WordLevel error"):
        encode_prompts(tokenizer, ["a", "b"])
    with pytest.raises(ValueError, match="tokenizer cannot read the text: WordLevel error"):
        evaluation_windows(tokenizer, ["b"], 1)


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
    "template, message",
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for m in messages %}", "endfor"),
        ("{{ missing('x') }}", "'missing' is undefined"),
        ("{% for tool in tools %}x{% endfor %}", "not iterable"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[7].content.x }}", "UndefinedError"),
        ("{% include 'other' %}", "TypeError|TemplateError|no loader"),
        (5, "chat template fails"),
        (["a"], "chat template fails"),
        ({"tool_use": "x"}, "chat template fails"),
    ],
)
def test_a_template_that_fails_is_quoted_in_one_line(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the model's chat template fails: ") as caught:
        encode_prompts(tokenizer, ["hi"], chat=True, system="Be short.")
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("{{ m.content }}<|im_end|>\n", "<|im_end|>"),  # ChatML
        ("[{{ m.role }}]{{ m.content }}<|eot_id|>", "<|eot_id|>"),
        (" {{ m.content }} </s>", "</s>"),  # Llama 2
        ("{{ m.content | trim }}{{ eos_token }}", "</s>"),
        ("{{ m.content }}<|im_end|>x<|eot_id|>", "<|im_end|>"),
        ("{{ m.role }}: {{ m.content }}\n\n", None),  # no token ends a turn
        ("{{ m.content }}.</s>", None),
        ("<|eot_id|>", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_token_that_the_template_writes_after_an_answer(answer, expected):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eot_id|>"]})
    tokenizer.add_tokens(["<|im_end|>", "<|im_"])  # some models do not call it special
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}" + answer + "{% endfor %}"
    found = end_of_turn(tokenizer)
    assert found == (None if expected is None else tokenizer.convert_tokens_to_ids(expected))


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
