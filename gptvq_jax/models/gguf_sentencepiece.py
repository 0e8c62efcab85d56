"""SentencePiece vocabularies of GGUF files: pieces with scores, as Llama 2, Phi-3 and Gemma have.

SentencePiece merges, of all neighbours whose concatenation is a piece, those whose piece has the
highest score, the leftmost first. That is a byte-pair encoding whose merges are all the ways to cut
a piece into two, in the order of the scores.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from gptvq_jax.models.fields import FLAG, Field, is_number

_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4
_SPACE = "▁"
_SCORES = Field(
    "a list of numbers", lambda value: isinstance(value, list) and all(map(is_number, value))
)


def sentencepiece(
    field: Callable[[str], Any], tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    """A tokenizer without added tokens; what is not a piece becomes bytes, <0x0A>.

    Args:
      field: returns the value of a metadata key, or None if the file does not have it.
      tokens: pieces.
      types: of each, GGUF's numbers.

    Raises:
      ValueError: a field is missing, of another type, or contradicts another.
    """
    key = "tokenizer.ggml.scores"
    scores = _SCORES.check(key, field(key))
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens and {key} are inconsistent")
    key = "tokenizer.ggml.add_space_prefix"
    prefix = FLAG.optional().check(key, field(key))
    prefix = prefix is None or prefix  # as in llama.cpp
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    start = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*start, spaces])
    text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    cut = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*text, *cut])
    return tokenizer


def _merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best score first."""
    usable = [index for index, kind in enumerate(types) if kind in (_NORMAL, _USER_DEFINED)]
    pieces = {tokens[index] for index in usable}
    normal = [index for index in usable if types[index] == _NORMAL]
    merges = []
    for index in sorted(normal, key=lambda index: -scores[index]):
        token = tokens[index]
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [pair for pair in cuts if pair[0] in pieces and pair[1] in pieces]
    return merges
