"""Windows of tokens for calibration and evaluation, after the protocol of the GPTQ paper.

The texts are joined by a blank line and tokenized once, with the tokenizer's default settings: a
tokenizer that adds a BOS adds one, at the very start, and none to the windows.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from gptvq_jax.data.vocabulary import check_tokens, encode

SEPARATOR = "\n\n"  # between documents


def calibration_windows(
    tokenizer: Any,
    documents: Iterable[str],
    num_windows: int,
    seqlen: int,
    seed: int,
    *,
    per_document: bool = False,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Draws random windows, which may overlap.

    Args:
      tokenizer: a transformers tokenizer.
      documents: the texts.
      num_windows, seqlen: shape of the result.
      seed: of the numpy Generator that draws; equal arguments give equal windows.
      per_document: draw each window inside one random document that is long enough, as GPTQ does
        with C4, instead of anywhere in the joined text.
      vocab_size: rows of the model's embedding; ids at or above it are an error.

    Returns:
      int32 (num_windows, seqlen).

    Raises:
      ValueError: the text (with `per_document`, every document) is shorter than one window, or
        the tokenizer does not belong to the model.
    """
    _check_positive(num_windows=num_windows, seqlen=seqlen)
    rng = np.random.default_rng(seed)
    if per_document:
        return _document_windows(tokenizer, list(documents), num_windows, seqlen, rng, vocab_size)
    tokens = _tokenize(tokenizer, SEPARATOR.join(documents), vocab_size)
    _check_length(tokens.size, seqlen, "the text has")
    starts = rng.integers(tokens.size - seqlen + 1, size=num_windows)
    return np.stack([tokens[start : start + seqlen] for start in starts])


def evaluation_windows(
    tokenizer: Any,
    documents: Iterable[str],
    seqlen: int,
    max_windows: int | None = None,
    *,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Cuts the joined text into consecutive windows that do not overlap; drops the remainder.

    Args:
      tokenizer, documents, vocab_size: as in `calibration_windows`.
      seqlen: tokens per window.
      max_windows: only the first so many.

    Returns:
      int32 (n, seqlen), n = min(max_windows, tokens // seqlen).

    Raises:
      ValueError: the text is shorter than one window, or the tokenizer does not belong to the
        model.
    """
    _check_positive(seqlen=seqlen, max_windows=1 if max_windows is None else max_windows)
    tokens = _tokenize(tokenizer, SEPARATOR.join(documents), vocab_size)
    _check_length(tokens.size, seqlen, "the text has")
    count = tokens.size // seqlen
    return tokens[: count * seqlen].reshape(count, seqlen)[:max_windows]


def bos_of(tokenizer: Any, windows: np.ndarray) -> str:
    """Where the token that begins a text stands in evaluation windows.

    Args:
      tokenizer: that made them.
      windows: int32 (n, seqlen), the first one included.

    Returns:
      "none", or "first token of the text".
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    return "first token of the text" if bos is not None and windows[0, 0] == bos else "none"


def _document_windows(tokenizer, documents, num_windows, seqlen, rng, vocab_size) -> np.ndarray:
    windows: list[np.ndarray] = []
    longest = 0
    while len(windows) < num_windows:
        before = len(windows)
        for index in rng.permutation(len(documents)):
            if len(windows) == num_windows:
                break
            tokens = _tokenize(tokenizer, documents[index], vocab_size)
            longest = max(longest, tokens.size)
            if tokens.size >= seqlen:
                start = rng.integers(tokens.size - seqlen + 1)
                windows.append(tokens[start : start + seqlen])
        if len(windows) == before:
            _check_length(longest, seqlen, f"the longest of {len(documents)} documents has")
    return np.stack(windows)


def _tokenize(tokenizer: Any, text: str, vocab_size: int | None) -> np.ndarray:
    # verbose=False: a text longer than the model's context is the point here, not a mistake.
    options = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
    tokens = np.asarray(encode(tokenizer, text, "the text", **options), np.int32)
    if vocab_size is not None:
        check_tokens(tokens, vocab_size, tokenizer, "the text")
    return tokens


def _check_length(available: int, seqlen: int, subject: str) -> None:
    if available < seqlen:
        fix = f" or seqlen <= {available}" if available >= 2 else ", of at least 2 tokens"
        raise ValueError(
            f"{subject} only {available} token{'s' * (available != 1)}, fewer than one window of "
            f"{seqlen}; pass more text{fix}"
        )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
