"""SentencePiece vocabularies of GGUF files against merging by scores, done plainly."""

import random
from pathlib import Path

import pytest

from gptvq_jax.models.gguf_tokenizer import build_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "<user>", "\n\n"]
LETTERS = list("▁abcde\n")
WORDS = ["▁a", "ab", "bc", "abc", "▁ab", "cd", "bcd", "de", "cde", "ea", "aa", "aaa", "▁▁", "▁b"]
TOKENS = [*SPECIAL, *BYTES, *LETTERS, *WORDS]
TYPES = [2, 3, 3, 3, 4] + [6] * 256 + [1] * (len(LETTERS) + len(WORDS))


def metadata(seed=0, **changes):
    order = random.Random(seed).sample(range(len(WORDS)), len(WORDS))
    scores = [0.0] * (len(SPECIAL) + 256) + [-100.0] * len(LETTERS) + [-float(i) for i in order]
    fields = {
        "model": "llama",
        "tokens": TOKENS,
        "token_type": TYPES,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": False,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def build(fields):
    return build_tokenizer(fields.get, Path("tiny.gguf"))


def merged(text, scores):
    """The best pair of neighbours first, the leftmost of the best, until none is a piece."""
    pieces = list(text)
    of_word = dict(zip(TOKENS, scores, strict=True))
    while True:
        pairs = [(pieces[i] + pieces[i + 1], i) for i in range(len(pieces) - 1)]
        found = [(-of_word[pair], i) for pair, i in pairs if pair in WORDS]
        if not found:
            return [TOKENS.index(piece) for piece in pieces]
        _, i = min(found)
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_merged_by_their_scores(seed):
    fields, rng = metadata(seed), random.Random(seed)
    tokenizer, scores = build(fields), fields["tokenizer.ggml.scores"]
    for _ in range(50):
        text = "".join(rng.choices("abcde ", k=rng.randint(1, 30)))
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *merged(text.replace(" ", "▁"), scores)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_bytes_special_tokens_and_user_defined_ones():
    tokenizer = build(metadata())
    ids = tokenizer("é\n\n\na<user>ß")["input_ids"]
    names = [TOKENS[index] for index in ids]
    assert names == ["<s>", "<0xC3>", "<0xA9>", "\n\n", "\n", "a", "<user>", "<0xC3>", "<0x9F>"]
    assert tokenizer.decode(ids) == "<s>é\n\n\na<user>ß"
    assert tokenizer.unk_token == "<unk>" and tokenizer.eos_token_id == 2


def test_a_space_before_the_text_unless_the_file_says_no():
    tokenizer = build(metadata(add_space_prefix=None))
    ids = tokenizer("b")["input_ids"]
    assert ids == [1, TOKENS.index("▁b")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "b"
    assert build(metadata(add_bos_token=False))("b")["input_ids"] == [TOKENS.index("b")]


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("scores", None, r"ggml\.scores must be a list of numbers"),
        ("scores", [1.0], r"tokens and tokenizer\.ggml\.scores are inconsistent"),
        ("scores", ["1"] * len(TOKENS), r"ggml\.scores must be"),
        ("add_space_prefix", 3, r"add_space_prefix must be true or false"),
    ],
)
def test_damaged_vocabularies(field, value, words):
    with pytest.raises(ValueError, match=rf"tiny\.gguf has no usable tokenizer: .*{words}"):
        build(metadata(**{field: value}))
