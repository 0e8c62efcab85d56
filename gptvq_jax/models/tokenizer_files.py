"""Tokenizers in Hugging Face's layout: loading one, and storing one that others can load."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptvq_jax.console.errors import first_line
from gptvq_jax.console.json_file import read_json_object
from gptvq_jax.models.companions import (
    TOKENIZER_CONFIG,
    VOCABULARIES,
    find_files,
    write_companions,
)

_JSON_OBJECTS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(directory: Path) -> Any:
    """The transformers tokenizer of a directory.

    Raises:
      ValueError: there is none, or it cannot be loaded; one line with the reason.
    """
    from transformers import AutoTokenizer  # its import takes seconds

    if reason := _lacking(directory):
        raise ValueError(f"{directory} has no usable tokenizer: {reason}")
    for name in _JSON_OBJECTS:
        if (directory / name).is_file():
            read_json_object(directory / name)
    try:
        # False: code that came with the tokenizer is not run, and nobody is asked.
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library raises plain Exception, and panics
        reason = first_line(error)
        raise ValueError(
            f"{directory} has no usable tokenizer: {reason}; if newer libraries wrote it, "
            "pip install --upgrade transformers tokenizers"
        ) from None


def save_tokenizer(tokenizer: Any, directory: Path, own_files: Mapping[str, bytes]) -> None:
    """Stores a tokenizer so that it loads as it did: in its own files, where it came with them.

    Args:
      tokenizer: of transformers, which writes what `own_files` lack.
      directory: created if missing.
      own_files: see ModelSource.companions.
    """
    tokenizer.save_pretrained(directory)
    make_portable(directory)
    write_companions(own_files, directory)


def make_portable(directory: Path) -> None:
    """Renames what only transformers 5 knows in tokenizer_config.json to what 4 and 5 know.

    Raises:
      ValueError: the file is damaged.
    """
    path = directory / TOKENIZER_CONFIG
    if not path.is_file():
        return
    before = read_json_object(path)
    config = dict(before)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        extra = config.pop("extra_special_tokens")
        config["additional_special_tokens"] = extra
    if config != before:
        path.write_text(
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
        )


def _lacking(directory: Path) -> str | None:
    """What is missing where transformers would go on, or give advice that does not help."""
    vocabularies = find_files(directory, VOCABULARIES)
    if not vocabularies:  # it may make a tokenizer that knows no word
        return "there is neither a tokenizer.json nor another vocabulary"
    if importlib.util.find_spec("sentencepiece") is None and all(
        ".model" in name and _is_message(directory / name) for name in vocabularies
    ):
        return f"{vocabularies[0]} is a SentencePiece model; pip install sentencepiece"
    return None


def _is_message(path: Path) -> bool:
    """Whether a file begins as SentencePiece's messages do; tiktoken's vocabularies are text."""
    with path.open("rb") as file:
        return file.read(1) == b"\n"
