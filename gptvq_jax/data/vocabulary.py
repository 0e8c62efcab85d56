"""From a text to ids that the model has embeddings of, or to one line about why not."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from gptvq_jax.console.errors import first_line

_COMPARED = 4096  # tokens of the text that two tokenizers cut


def encode(tokenizer: Any, text: str, name: str, **options: Any) -> list[int]:
    """Token ids of a text.

    Args:
      tokenizer: of transformers, called with `options`.
      name: of the text, for the message.

    Raises:
      ValueError: the tokenizer fails, because it has no token for what it does not know, say.
    """
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # the Rust library raises the plain kind
        reason = first_line(error)
        raise ValueError(f"the model's tokenizer cannot read {name}: {reason}") from None


def check_tokens(tokens: Sequence[int], vocab_size: int, tokenizer: Any, text: str) -> None:
    """Raises ValueError, which names the token, if one has no row in the embedding.

    A tokenizer may have more ids than the model, for padding say; only a text that holds one of
    them cannot be read.

    Args:
      tokens: of the text.
      vocab_size: rows of the embedding.
      tokenizer: of transformers, to name the token.
      text: what is wrong then, as in "prompt 0".
    """
    tokens = np.asarray(tokens)
    beyond = tokens[tokens >= vocab_size]
    if beyond.size:
        convert = getattr(tokenizer, "convert_ids_to_tokens", repr)
        raise ValueError(
            f"{text} holds the token {convert(int(beyond[0]))!r}: its token id {beyond[0]} is "
            f"outside the model's vocabulary of {vocab_size}; take it out of the text, or use the "
            "tokenizer that belongs to the model"
        )


def check_same_vocabulary(
    model: tuple[Any, int, str], reference: tuple[Any, int, str], windows: np.ndarray
) -> None:
    """Raises ValueError, which names both models, if a token id means another text in each.

    Args:
      model, reference: tokenizer of transformers, rows of the embedding, name for the message.
      windows: tokens (n, T) of the model's tokenizer, some of whose text both tokenizers must cut
        alike; that one of them puts a token before every text does not count.
    """
    (tokenizer, rows, name), (other, other_rows, other_name) = model, reference
    fix = "compare models that share a tokenizer"
    if rows != other_rows:
        raise ValueError(
            f"{name} has a vocabulary of {rows} tokens, {other_name} of {other_rows}; {fix}"
        )
    text = tokenizer.decode(windows.ravel()[:_COMPARED])
    options = {"verbose": False, "add_special_tokens": False}
    ids, others = (encode(each, text, "the text", **options) for each in (tokenizer, other))
    if ids != others:
        at = next(i for i, pair in enumerate(zip_longest(ids, others)) if pair[0] != pair[1])
        raise ValueError(
            f"{name} and {other_name} have other vocabularies: token {at} of the text is "
            f"{ids[at : at + 1]} in the first and {others[at : at + 1]} in the second; {fix}"
        )
