"""Windows of tokens for calibration and evaluation, after the protocol of the GPTQ paper.

The texts are joined by a blank line and tokenized once, with the tokenizer's default settings: a
tokenizer that adds a BOS adds one, at the very start, and none to the windows. Windows that are
held out of calibration lie in the last part of the text, which no other window reaches into.
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
    held_out: int = 0,
    reserved: float = 0.0,
    per_document: bool = False,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Draws random windows, which may overlap, and others from a part of the text kept for them.

    Args:
      tokenizer: a transformers tokenizer.
      documents: the texts.
      num_windows, seqlen: shape of the result, the windows held out apart.
      seed: of the numpy Generators that draw; equal arguments give equal windows.
      held_out: windows that follow the others, from the end of the text.
      reserved: the part of the text that is kept for these, 0 to below 1: its last tokens, at least
        a window of them; the same ones whatever `seed`, `num_windows` and `held_out`.
      per_document: draw each window inside one random document that is long enough, as GPTQ does
        with C4, instead of anywhere in the joined text; `reserved` is then of the documents.
      vocab_size: rows of the model's embedding; ids at or above it are an error.

    Returns:
      int32 (num_windows + held_out, seqlen).

    Raises:
      ValueError: the text (with `per_document`, every document) is shorter than one window, or one
        of its two parts is, or the tokenizer does not belong to the model.
    """
    _check_positive(num_windows=num_windows, seqlen=seqlen)
    if held_out and not reserved:
        raise ValueError(f"{held_out=} windows need a part of the text; set reserved above 0")
    drawn = zip((num_windows, held_out), (seed, (seed, 1)), strict=True)
    if per_document:
        documents = list(documents)
        kept = max(1, int(reserved * len(documents))) if reserved else 0
        if kept and len(documents) < 2:
            raise ValueError(
                f"{len(documents)} documents are too few for some of them to be held out "
                "(calibration.held_out above 0); pass more text or set it to 0"
            )
        parts = documents[: len(documents) - kept], documents[len(documents) - kept :]
        windows = [
            _document_windows(tokenizer, part, count, seqlen, np.random.default_rng(s), vocab_size)
            for part, (count, s) in zip(parts, drawn, strict=True)
        ]
        return np.concatenate(windows)
    tokens = _tokenize(tokenizer, SEPARATOR.join(documents), vocab_size)
    kept = max(seqlen, int(reserved * tokens.size)) if reserved else 0
    subject = f"beside {kept} held out (calibration.held_out; 0 holds out none) the text has"
    _check_length(tokens.size - kept, seqlen, subject if kept else "the text has")
    parts = tokens[: tokens.size - kept], tokens[tokens.size - kept :]
    windows = []
    for part, (count, s) in zip(parts, drawn, strict=True):
        places = max(1, part.size - seqlen + 1)
        starts = np.random.default_rng(s).integers(places, size=count)
        windows += [part[start : start + seqlen] for start in starts]
    return np.stack(windows)


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
    return np.stack(windows) if windows else np.empty((0, seqlen), np.int32)


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
