"""Tokens that the tokenizer knows and the model does not: ids beyond the rows of the embedding."""

from collections.abc import Sequence
from typing import Any

import numpy as np


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
