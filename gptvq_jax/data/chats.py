"""Chats of a JSON Lines file: {"messages": [{"role": "user", "content": "..."}, ...]} a line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptvq_jax.data.local_files import check_file, text_lines

Message = dict[str, str]


def chats(name: str) -> Iterator[tuple[int, list[Message]]]:
    """Yields the number of each line and its messages.

    Args:
      name: of a .jsonl file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another kind of file, a line that is no chat or has no answer; names the line.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() != ".jsonl":
        raise ValueError(
            f"--chat reads a .jsonl file of messages, not {name!r}; name one with --dataset"
        )
    check_file(path)
    found = False
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            found = True
            yield number, _messages(line, f"{path} line {number}")
    if not found:
        raise ValueError(f"{path} contains no chat")


def _messages(line: str, where: str) -> list[Message]:
    try:
        messages: Any = json.loads(line)["messages"]
    except (ValueError, KeyError, TypeError, RecursionError):
        messages = None
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            f'{where} is not {{"messages": [{{"role": "user", "content": "..."}}, ...]}} with '
            "strings of Unicode"
        )
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f'{where} has no message of the role "assistant", which is learned')
    return messages


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    texts = message.get("role"), message.get("content")
    return all(isinstance(text, str) and _is_unicode(text) for text in texts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate without its other half
        return False
    return True
