"""The files that transformers reads beside a model's weights and config.json."""

import json
from collections.abc import Collection
from pathlib import Path

from gptvq_jax.console.json_file import read_json_object
from gptvq_jax.models.fields import SIGNED_IDS, token_ids

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# One of them holds the vocabulary.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.*.json",
    "*.model",
    "*.model.v*",  # Mistral's
    "*.tiktoken",
    "tekken.json",
    "vocab.*",
)
_PATTERNS = (
    *VOCABULARIES,
    "merges.txt",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    GENERATION_CONFIG,
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)


def find_files(directory: Path, patterns: Collection[str] = _PATTERNS) -> list[str]:
    """Names, relative to `directory`, of the files that match; by default of all companions."""
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(directory).as_posix() for path in found)


def read_companions(directory: Path) -> dict[str, bytes]:
    """{name: content} of the companions in a directory in Hugging Face's layout."""
    return {name: (directory / name).read_bytes() for name in find_files(directory)}


def write_companions(companions: dict[str, bytes], directory: Path) -> None:
    """Writes what `read_companions` returned; files of the same names are replaced."""
    for name, content in companions.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_stop_tokens(directory: Path) -> tuple[int, ...]:
    """The eos_token_id of generation_config.json; () if the file or the field is absent.

    Raises:
      ValueError: the file is damaged, or the field holds no ids.
    """
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return ()
    try:
        ids = SIGNED_IDS.optional().read(read_json_object(path), "eos_token_id")
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return token_ids(ids)


def generation_config(bos_token_id: int | None, stop_tokens: Collection[int]) -> bytes:
    """A generation_config.json for a model that came without one."""
    fields = {"bos_token_id": bos_token_id, "eos_token_id": sorted(stop_tokens)}
    return (json.dumps(fields, indent=2) + "\n").encode()
