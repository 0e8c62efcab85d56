"""Prompts to tokens, tokens to text piece by piece."""

import re
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gptvq_jax.data.windows import evaluation_windows
from gptvq_jax.serve import prompts
from gptvq_jax.serve.prompts import TextStream, encode_prompts
from gptvq_jax.serve.stop_tokens import end_of_turn

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

        all_special_ids = ()

        def convert_ids_to_tokens(self, token):
            return f"w{token}"

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


def with_specials(backend):
    """A tokenizer of transformers with two special tokens behind the vocabulary."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


def metaspace():
    """Words and spaces of sentencepiece; the decoder takes the first space away."""
    pieces = ["\u2581quick", "\u2581fox", "\u2581", "es", "\u00f6", "\u2581\u2581", "\ufffd"]
    backend = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="es"))
    backend.decoder = decoders.Metaspace()
    return with_specials(backend)


def byte_fallback():
    """As in Llama 2: what the vocabulary lacks is written in tokens of single bytes."""
    pieces = ["\u2581quick", "\u2581fox", "\u2581", "es", "\u00f6"]
    pieces += [f"<0x{byte:02X}>" for byte in (0x41, 0xE2, 0x82, 0xAC, 0xFF)]
    backend = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="es"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return with_specials(backend)


def wordpiece():
    pieces = ["quick", "fox", "##es", "."]
    backend = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="fox"))
    backend.decoder = decoders.WordPiece()
    return with_specials(backend)


def byte_level():
    return with_specials(byte_tokenizer().backend_tokenizer)


TOKENIZERS = {make.__name__: make() for make in (byte_level, metaspace, byte_fallback, wordpiece)}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_any_pieces_are_the_text_as_a_whole(name, data):
    """Whatever the tokens, their chunks and what came before; special tokens half of the time."""
    tokenizer = TOKENIZERS[name]
    special = st.sampled_from(tokenizer.all_special_ids)
    ids = st.lists(st.one_of(special, st.integers(0, len(tokenizer) - 1)), max_size=12)
    context, chunks = data.draw(ids), data.draw(st.lists(ids, max_size=8))
    texts = TextStream(tokenizer, context)
    shown = "".join([*map(texts.add, chunks), texts.finish()])
    whole = tokenizer.decode([*context, *sum(chunks, [])], skip_special_tokens=True)
    before = tokenizer.decode(context, skip_special_tokens=True)
    if whole.startswith(before):  # else bytes of the context became characters
        assert shown == whole[len(before) :]


def test_a_space_survives_a_chunk_of_special_tokens():
    tokenizer = TOKENIZERS["metaspace"]
    texts = TextStream(tokenizer)
    pieces = [texts.add(c) for c in ([0], [tokenizer.eos_token_id] * 2, [0, 1])]
    assert pieces == ["quick", "", " quick fox"]


def test_plain_prompts_are_tokenized():
    prompts = ["one", "three", "\n", "  "]
    assert [BYTES.decode(ids) for ids in encode_prompts(BYTES, prompts)] == prompts


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


def test_a_template_without_end_is_ended(monkeypatch):
    monkeypatch.setattr(prompts, "_TEMPLATE_SECONDS", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    tokenizer = byte_tokenizer()
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = 3 * loop + 3 * "{% endfor %}"
    with pytest.raises(ValueError, match="chat template fails: it takes more than 0.05 s"):
        encode_prompts(tokenizer, ["hi"], chat=True)
    assert end_of_turn(tokenizer) is None
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is before


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
        ({"prompts": ["a", ""]}, "prompt 1 is empty"),
        ({"prompts": ["a", "b\udcff"]}, "prompt 1 is not UTF-8: byte 0xff after 1 characters"),
        ({"prompts": ["\ud83d"]}, r"prompt 0 is not UTF-8: surrogate \\ud83d after 0"),
        ({"prompts": ["a"], "chat": True, "system": "\udcff"}, "the system message is not UTF-8"),
        ({"prompts": ["a"], "chat": True}, "no chat template; leave out --chat"),
        ({"prompts": ["a"], "system": "Be short."}, "add --chat"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(BYTES, **arguments)
