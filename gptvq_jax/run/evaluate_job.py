"""One model on held-out text, or two against each other. What scripts/evaluate.py calls."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptvq_jax.adapters.adapted_source import AdaptedSource
from gptvq_jax.adapters.peft_files import open_adapter
from gptvq_jax.config import EvaluationSettings, RunSettings, evaluation_settings
from gptvq_jax.console.comparison_text import comparison_lines, figure_text, protocol_text
from gptvq_jax.console.progress import Progress
from gptvq_jax.core.divergence import FIGURES
from gptvq_jax.data.vocabulary import check_same_vocabulary
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.compare import Figure, comparison, of_perplexity, write_figures
from gptvq_jax.run.device_memory import EVALUATE, explained
from gptvq_jax.run.evaluate import Evaluation, evaluated, precision_text
from gptvq_jax.run.text import check_seqlen, describe, evaluation_tokens, protocol
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.open_any import open_any


def evaluate(
    checkpoint: str | None, model: str | None, adapter: str | None = None, **overrides: Any
) -> float:
    """Prints and returns the perplexity of a model.

    Args:
      checkpoint, model: exactly one of them: directory of a packed checkpoint, or any model, as
        `open_any` takes it.
      adapter: directory of one in PEFT's format, merged into the weights; None: none.
      overrides: fields of EvaluationSettings; None leaves what a checkpoint was made with.

    Raises:
      ValueError, FileNotFoundError: bad input, in one line that names the flag or file.
    """
    source = _open(checkpoint, model, adapter)
    settings, windows = _held_out([source], overrides)
    with (
        explained(stage=EVALUATE),
        _evaluated(source, source.name, settings, windows) as evaluation,
        Progress(len(windows), "next tokens", "window") as progress,
    ):
        figure = of_perplexity(evaluation.losses(progress))
    _print(source, settings, windows, [("perplexity", figure_text(figure, ".4f"))])
    return figure["value"]


def compare(
    checkpoint: str | None,
    model: str | None,
    against: str,
    adapter: str | None = None,
    **overrides: Any,
) -> dict[str, Figure]:
    """Prints and returns how far a model is from another one, its reference, on the same text.

    They are read one after the other, block by block.

    Args:
      checkpoint, model, adapter, overrides: as for `evaluate`.
      against: the reference, as `open_any` takes it; it has no adapter.

    Returns:
      As run.compare.comparison; "perplexity_float" is of the reference.

    Raises:
      ValueError, FileNotFoundError: bad input, in one line that names the flag or file; two models
        whose vocabularies differ.
    """
    source, reference = _open(checkpoint, model, adapter), open_any(against)
    settings, windows = _held_out([source, reference], overrides)
    named = ((source, checkpoint or model), (reference, against))
    vocabularies = ((each.tokenizer, each.config.vocab_size, name) for each, name in named)
    check_same_vocabulary(*vocabularies, windows)
    figures = np.empty((len(windows), windows.shape[1] - 1, len(FIGURES)), np.float32)
    with (
        explained(stage=EVALUATE),
        _evaluated(source, "model", settings, windows) as evaluation,
        _evaluated(reference, "reference", settings, windows) as of_reference,
        Progress(len(windows), "compare", "window") as progress,
    ):
        write_figures(evaluation, of_reference, figures, progress)
    compared = comparison(figures)
    perplexity, of_other = (
        figure_text(compared[name], ".4f") for name in ("perplexity", "perplexity_float")
    )
    ratio = figure_text(compared["log_perplexity_ratio"], "+.4f")
    lines = [
        ("perplexity", perplexity),
        ("reference", f"{of_other} of {against}; log-perplexity {ratio}"),
        *comparison_lines(compared, "model", "reference"),
    ]
    _print(source, settings, windows, lines)
    return compared


def _open(checkpoint: str | None, model: str | None, adapter: str | None) -> ModelSource:
    if (checkpoint is None) == (model is None):
        raise ValueError("pass either --checkpoint=DIR or --model=NAME")
    source = PackedCheckpoint(checkpoint) if checkpoint else open_any(model)
    return AdaptedSource(source, open_adapter(adapter, source)) if adapter else source


def _held_out(
    sources: list[ModelSource], overrides: dict[str, Any]
) -> tuple[EvaluationSettings, np.ndarray]:
    """The settings and windows of a text, cut by the tokenizer of the first model."""
    source = sources[0]
    # An imported checkpoint was made without a text.
    stored = source.base if isinstance(source, AdaptedSource) else source
    packed = isinstance(stored, PackedCheckpoint)
    made_with = stored.manifest["config"].get("evaluation", {}) if packed else {}
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = RunSettings(evaluation=evaluation_settings(made_with, given))
    for each in sources:
        check_seqlen(each, "evaluation", settings.evaluation.seqlen, flag="--seqlen")
    return settings.evaluation, evaluation_tokens(source, settings)


@contextlib.contextmanager
def _evaluated(
    source: ModelSource, name: str, settings: EvaluationSettings, windows: np.ndarray
) -> Iterator[Evaluation]:
    """`evaluated` with a progress bar."""
    depth = source.config.num_hidden_layers
    with contextlib.ExitStack() as stack:
        with Progress(depth, f"evaluate {name}", "block") as progress:
            options = dict(progress=progress, products=settings.products)
            made = evaluated(source, windows, settings.batch_size, **options)
            evaluation = stack.enter_context(made)
        yield evaluation


def _print(
    source: ModelSource,
    settings: EvaluationSettings,
    windows: np.ndarray,
    lines: list[tuple[str, str]],
) -> None:
    """Lines of figures, and what they were measured on."""
    (label, text), *others = lines
    how = precision_text(settings.products)
    first = (label, f"{text} on {describe(settings.dataset, windows)}, {how}")
    last = ("protocol", protocol_text(protocol(source, settings.dataset, windows)))
    for label, text in (first, *others, last):
        print(f"{label:13s} {text}")
