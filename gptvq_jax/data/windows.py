"""Windows of tokens for calibration and evaluation, after the protocol of the GPTQ paper.

The texts are joined by a blank line and tokenized once, with the tokenizer's default settings: a
tokenizer that adds a BOS adds one, at the very start, and none to the windows, unless `begun` puts
one there. Windows that are
held out of calibration stand at fixed places, evenly spread, and no other window comes near them:
what is said a page on is much alike.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from gptvq_jax.data.vocabulary import check_tokens, encode

SEPARATOR = "\n\n"  # between documents
RESERVED = 0.05  # of a text, for the windows held out and around them


def calibration_windows(
    tokenizer: Any,
    documents: Iterable[str],
    num_windows: int,
    seqlen: int,
    seed: int,
    *,
    held_out: int = 0,
    per_document: bool = False,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Draws random windows, which may overlap, and places others where none of these reach.

    A random window that would is drawn again; the rest of them are what they are without any held
    out.

    Args:
      tokenizer: a transformers tokenizer.
      documents: the texts.
      num_windows, seqlen: shape of the result, the windows held out apart.
      seed: of the numpy Generator that draws; equal arguments give equal windows.
      held_out: windows that follow the others, in the middle of so many equal parts of the text:
        the same ones whatever `seed` and `num_windows`. RESERVED of each part, around its window,
        is not reached by others.
      per_document: draw each window inside one random document that is long enough, as GPTQ does
        with C4, instead of anywhere in the joined text; whole documents are held out then.
      vocab_size: rows of the model's embedding; ids at or above it are an error.

    Returns:
      int32 (num_windows + held_out, seqlen).

    Raises:
      ValueError: the text (with `per_document`, every document) is shorter than one window, or all
        of it is held out, or the tokenizer does not belong to the model.
    """
    _check_positive(num_windows=num_windows, seqlen=seqlen)
    rng = np.random.default_rng(seed)
    if per_document:
        counts = num_windows, held_out
        return _document_windows(tokenizer, list(documents), counts, seqlen, rng, vocab_size)
    tokens = _tokenize(tokenizer, SEPARATOR.join(documents), vocab_size)
    _check_length(tokens.size, seqlen, "the text has")
    places = tokens.size - seqlen + 1
    kept, free = [], np.ones(places, bool)
    for middle in _middles(tokens.size, held_out):
        kept.append(min(places - 1, middle - seqlen // 2))
        around = max(seqlen, int(RESERVED * tokens.size / held_out))
        first = min(kept[-1], middle - around // 2)
        free[max(0, first - seqlen + 1) : max(0, first) + around] = False
    if not free.any():
        raise _all_held_out(f"{tokens.size} tokens", held_out, seqlen)
    starts = rng.integers(places, size=num_windows)
    taken = ~free[starts]
    starts[taken] = rng.choice(np.flatnonzero(free), size=taken.sum())
    return np.stack([tokens[start : start + seqlen] for start in [*starts, *kept]])


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


def begun(tokenizer: Any, windows: np.ndarray, field: str) -> np.ndarray:
    """Windows with the BOS token in place of their first token, which nothing predicts.

    Args:
      tokenizer: a transformers tokenizer.
      windows: int32 (n, seqlen).
      field: that asks for it, for the error.

    Raises:
      ValueError: the tokenizer has no BOS token.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise ValueError(f"the tokenizer has no BOS token; set {field}=False")
    return np.concatenate([np.full_like(windows[:, :1], bos), windows[:, 1:]], axis=1)


def bos_of(tokenizer: Any, windows: np.ndarray) -> str:
    """Where the token that begins a text stands in evaluation windows.

    Args:
      tokenizer: that made them.
      windows: int32 (n, seqlen), the first one included.

    Returns:
      "none", "first token of the text", or, of several, "first token of each window".
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and len(windows) > 1 and (windows[:, 0] == bos).all():
        return "first token of each window"
    return "first token of the text" if bos is not None and windows[0, 0] == bos else "none"


def _document_windows(tokenizer, documents, counts, seqlen, rng, vocab_size) -> np.ndarray:
    num_windows, held_out = counts
    longest = 0

    def read(index: int) -> np.ndarray | None:
        nonlocal longest
        tokens = _tokenize(tokenizer, documents[index], vocab_size)
        longest = max(longest, tokens.size)
        return tokens if tokens.size >= seqlen else None

    kept: dict[int, np.ndarray] = {}
    for middle in _middles(len(documents), held_out):
        for index in np.roll(np.arange(len(documents)), -middle):  # the next one long enough
            if index not in kept and (tokens := read(index)) is not None:
                start = (tokens.size - seqlen) // 2
                kept[index] = tokens[start : start + seqlen]
                break
    windows: list[np.ndarray] = []
    while len(windows) < num_windows:
        before = len(windows)
        for index in rng.permutation(len(documents)):
            if len(windows) == num_windows:
                break
            if index not in kept and (tokens := read(index)) is not None:
                start = rng.integers(tokens.size - seqlen + 1)
                windows.append(tokens[start : start + seqlen])
        if len(windows) == before:
            _check_length(longest, seqlen, f"the longest of {len(documents)} documents has")
            raise _all_held_out(f"{len(kept)} documents long enough", held_out, seqlen)
    return np.stack([*windows, *kept.values()])


def _middles(size: int, count: int) -> list[int]:
    """Of so many equal parts."""
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def _all_held_out(what: str, held_out: int, seqlen: int) -> ValueError:
    return ValueError(
        f"the text has {what}, too few for a window of {seqlen} beside {held_out} that are held "
        "out; pass more text, or lower calibration.held_out (0 holds out none)"
    )


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
