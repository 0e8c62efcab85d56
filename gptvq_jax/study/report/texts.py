"""What models say: greedy continuations of a few prompts, made once and kept in a file."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from gptvq_jax.console.errors import first_line, printable
from gptvq_jax.console.json_file import read_json_lines
from gptvq_jax.console.progress import Progress
from gptvq_jax.data.vocabulary import check_tokens
from gptvq_jax.files.durable import append_lines
from gptvq_jax.models.open import open_source
from gptvq_jax.serve.generate import check_prompts, generate
from gptvq_jax.serve.params import dense_params, float32_bytes, packed_params
from gptvq_jax.serve.prompts import encode_prompts
from gptvq_jax.serve.stop_tokens import stop_tokens
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study.report.page import Said
from gptvq_jax.study.report.results import Cell, named

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a fox who",
    "To bake bread at home, you need",
)
MAX_TOKENS = 32
_SMALL = 2**30  # bytes of a float32 model that is run without being asked for
_READING = (ValueError, OSError, NotImplementedError)


class Model(NamedTuple):
    """One that is asked."""

    name: str
    digest: str  # of its weights
    open: Callable[[], Any]
    params: Callable[[Any], Any]


def said(cells: Sequence[Cell], prompts: Sequence[str], store: Path, notes: list[str]) -> Said:
    """Continues prompts with the float models of cells and with their checkpoints.

    Args:
      cells: those without a checkpoint are left out.
      prompts: texts; none: PROMPTS, where the models are small.
      store: JSON Lines of what was said before; gets what is new.
      notes: gets a line for what is missing.

    Raises:
      ValueError: a prompt that is empty, too long, or not to be read by the tokenizer.
      FullDiskError: there is no room for the store.
    """
    models = _models(cells, small_only=not prompts, notes=notes)
    prompts = tuple(dict.fromkeys(prompts or PROMPTS))
    known = _known(store)
    new = [m for m in models if any(_key(m, prompt) not in known for prompt in prompts)]
    silent = set()
    if new:
        print(
            f"{len(new)} model{'s' * (len(new) > 1)} to continue {len(prompts)} "
            f"prompt{'s' * (len(prompts) > 1)}; --noprompts leaves that out"
        )
        with Progress(len(new), "prompts", "model") as progress:
            for model in new:
                progress.note(model.name)
                texts = _texts(model, prompts, notes)
                if texts is None:
                    silent.add(model.name)
                else:
                    rows = [
                        {"weights": model.digest, "prompt": p, "max_tokens": MAX_TOKENS, "text": t}
                        for p, t in zip(prompts, texts, strict=True)
                    ]
                    append_lines(store, rows)
                    known |= {_key(model, row["prompt"]): row["text"] for row in rows}
                progress.advance()
    told = [model for model in models if model.name not in silent]
    if not told:
        return {}
    return {prompt: {m.name: known[_key(m, prompt)] for m in told} for prompt in prompts}


def _models(cells: Sequence[Cell], small_only: bool, notes: list[str]) -> list[Model]:
    """Each float model once, and then the checkpoints."""
    floats: dict[str, Model] = {}
    packed, large, without = [], [], []
    for cell in cells:
        path = cell.directory / "checkpoint"
        if not (path / "manifest.json").is_file():
            without += [cell] if cell.status == "done" else []
            continue
        try:
            checkpoint = PackedCheckpoint(path)
            big = float32_bytes(checkpoint.config) > _SMALL
        except _READING as error:
            notes.append(f"no texts of {cell.name}: {printable(first_line(error))}")
            continue
        if small_only and big:
            large.append(cell)
            continue
        digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
        packed.append(Model(cell.name, digest, lambda p=path: PackedCheckpoint(p), packed_params))
        name = str(cell.settings.get("model", ""))
        weights = f"{name} {cell.settings.get('weights')}"
        if name:
            floats.setdefault(
                weights,
                Model(f"float ({name})", weights, lambda n=name: open_source(n), dense_params),
            )
    if large:
        notes.append(
            f"{named(large)} would take long to ask: what they say is left out; name prompts "
            "with --prompt to ask them"
        )
    if without:
        notes.append(f"no checkpoint of {named(without)}: what it says is left out")
    return [*floats.values(), *packed]


def _texts(model: Model, prompts: Sequence[str], notes: list[str]) -> list[str] | None:
    """Continuations; None, and a note, where the model cannot be read."""
    try:
        source = model.open()
    except _READING as error:
        notes.append(f"no texts of {model.name}: {printable(first_line(error))}")
        return None
    tokens = encode_prompts(source.tokenizer, prompts)
    for index, prompt in enumerate(tokens):
        check_tokens(prompt, source.config.vocab_size, source.tokenizer, f"prompt {index}")
    check_prompts(source.config, tokens, MAX_TOKENS)
    try:
        params = model.params(source)
    except _READING as error:
        notes.append(f"no texts of {model.name}: {printable(first_line(error))}")
        return None
    stop = stop_tokens(source)
    result = generate(source.config, params, tokens, max_tokens=MAX_TOKENS, stop_tokens=stop)
    texts = []
    for before, after in zip(tokens, result.tokens, strict=True):
        # Decoded together: a space between the two belongs to the second.
        whole, first = (source.tokenizer.decode(t) for t in ([*before, *after], before))
        texts.append(whole.removeprefix(first))
    return texts


def _key(model: Model, prompt: str) -> tuple[Any, ...]:
    return model.digest, prompt, MAX_TOKENS


def _known(store: Path) -> dict[tuple[Any, ...], str]:
    """{_key: text} of the store; one that is damaged is made again."""
    try:
        rows = read_json_lines(store) if store.is_file() else []
        return {
            (row["weights"], row["prompt"], row["max_tokens"]): str(row["text"]) for row in rows
        }
    except (ValueError, KeyError, TypeError) as error:
        logging.warning("%s is made again: %s", store, first_line(error))
        store.unlink()
        return {}
