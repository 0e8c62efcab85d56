"""A synthetic checkpoint: the shapes of a published model, weights that nobody trained."""

import json
from pathlib import Path
from typing import Any

from gptvq_jax.console.json_file import read_json_object
from gptvq_jax.console.progress import Progress
from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import check_room, directory_bytes
from gptvq_jax.files.new_directory import locked
from gptvq_jax.models.byte_tokenizer import BOS, EOS, SPECIAL, byte_tokenizer
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.published import published
from gptvq_jax.models.tokenizer_files import make_portable
from gptvq_jax.study.random_model import (
    Weights,
    config_text,
    files,
    model_bytes,
    shortened,
    write_weights,
)

RECORD = "synthetic.json"  # what the directory is made from; there before any weight
TAIL = 4.0  # of the column scales: a column in 600 is 4 times the root mean square or more
_NORM_SPREAD = 0.1
_TOKENS = 256 + len(SPECIAL)
_COMPANION_BYTES = 1 << 16


def hf_fields(like: str, blocks: int = 0) -> tuple[str, dict[str, Any]]:
    """Name and config.json of a model that exists only as a shape.

    Args:
      like: a row of models/published.py, or the path of a config.json or of its directory.
      blocks: of it, from the first; 0: all.

    Raises:
      ValueError, FileNotFoundError: there is neither; it is damaged; it has fewer blocks.
    """
    path = Path(like).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return path.resolve().parent.name, shortened(read_json_object(path), blocks)
    return like, shortened(published(like), blocks)


def model_config(like: str, blocks: int = 0) -> ModelConfig:
    """Of such a model, whose special tokens are those of byte_tokenizer.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: as `hf_fields` and ModelConfig.from_hf.
    """
    name, fields = hf_fields(like, blocks)
    own = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}
    config = ModelConfig.from_hf({**fields, **own})
    if config.vocab_size < _TOKENS:
        raise ValueError(
            f"{name} has a vocabulary of {config.vocab_size}, and a tokenizer of bytes needs "
            f"{_TOKENS}; pass a config.json with a larger vocab_size"
        )
    return config


def make_synthetic(like: str, output: str, blocks: int = 0, seed: int = 0) -> Path:
    """Writes config.json, a tokenizer of bytes and bfloat16 weights; goes on where it was stopped.

    Memory holds a few rows of a tensor. config.json comes last: without it the directory is no
    model.

    Args:
      like, blocks: as in `hf_fields`.
      output: directory, new or of the same command.
      seed: of the weights.

    Raises:
      ValueError: the directory holds something else, or another process writes it.
      FullDiskError: there is no room; said before anything is written.
    """
    config = model_config(like, blocks)
    directory = Path(output).expanduser()
    text, size = config_text(config), model_bytes(config) + _COMPANION_BYTES
    record = {"config": json.loads(text), "seed": seed}
    _check_own(directory, record)
    here = directory_bytes(directory, "*.safetensors") if directory.is_dir() else 0
    print(f"{directory}: {config.num_hidden_layers} blocks, {size / 1e9:.3f} GB on the disk")
    check_room(directory, max(0, size - here))
    durable.make_directory(directory)
    with locked(directory.resolve()):
        durable.drop_partial(directory)
        durable.write_text(directory / RECORD, json.dumps(record, indent=2) + "\n")
        weights = Weights(seed, TAIL, _NORM_SPREAD, config.num_hidden_layers)
        with Progress(len(files(config)), "synthetic model", "file", work=size) as progress:
            done = {path.name for path in directory.glob("*.safetensors")}

            def on_file(name: str, num_bytes: int) -> None:
                if name in done:
                    progress.skip(1, num_bytes)
                else:
                    progress.advance(name, work=num_bytes)

            write_weights(directory, config, weights, on_file)
        byte_tokenizer(SPECIAL).save_pretrained(directory)
        make_portable(directory)
        durable.sync_tree(directory)
        durable.write_text(directory / "config.json", text)
    return directory


def _check_own(directory: Path, record: dict[str, Any]) -> None:
    """Raises ValueError if a directory holds what another command has made."""
    if not directory.exists() or directory.is_dir() and not any(directory.iterdir()):
        return
    if not (directory / RECORD).is_file():
        raise ValueError(f"{directory} exists and is not an empty directory; choose another")
    if read_json_object(directory / RECORD) != record:
        raise ValueError(
            f"{directory} holds another synthetic model, as its {RECORD} says; choose another "
            "directory, or remove it"
        )
