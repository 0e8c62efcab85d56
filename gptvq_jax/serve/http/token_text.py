"""How a single token is written in an answer."""

from typing import Any


def token_text(tokenizer: Any, token: int) -> str:
    """Its text; where it is a part of a character, its name in the vocabulary."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in text or not text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """Its UTF-8; None where it is a part of a character."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return None if "\ufffd" in text else list(text.encode())
