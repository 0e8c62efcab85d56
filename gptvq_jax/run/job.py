"""The main job: quantize, evaluate, report. What scripts/quantize.py calls."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from absl import logging

from gptvq_jax.config import RunSettings, evaluation_settings, from_config, to_dict
from gptvq_jax.console import report
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch, peak_memory_bytes
from gptvq_jax.data.corpora import documents
from gptvq_jax.data.windows import calibration_windows, evaluation_windows
from gptvq_jax.files.disk_space import check_room, directory_bytes
from gptvq_jax.methods.layer import check_row_groups
from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import ModelSource, layer_shapes
from gptvq_jax.run import allocation, gradients
from gptvq_jax.run.evaluate import PRECISION, Evaluation, perplexity
from gptvq_jax.run.overrides import settle
from gptvq_jax.run.passes import quantize_model
from gptvq_jax.run.walk import walk
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.storage.checkpoint import PackedCheckpoint


def quantize(
    config: Any,
    workdir_path: str,
    perplexity_float: float | None = None,
    given: Collection[str] = (),
    prepare: Callable[[WorkDir], None] | None = None,
) -> dict[str, Any]:
    """Runs one config to its end and returns the summary, which is also printed.

    Args:
      config: ConfigDict, as from `default_config`.
      workdir_path: directory for everything the run writes; an earlier run in it is resumed.
      perplexity_float: of the float model on the same held-out text, if it is known already.
      given: fields of the config that the command line names; each must have an effect.
      prepare: called with the work directory before the first pass, unless the run is finished: it
        may put there what other runs have made, which the passes then find done.

    Raises:
      ValueError, FileNotFoundError: bad input, in one line that names the field or file.
    """
    stopwatch = Stopwatch()
    config, note = settle(config, given)
    settings = from_config(config)
    if note:
        logging.warning("%s", note)
    with stopwatch.stage("open model"):
        source = open_source(settings.model)
    check_plan(source, settings)
    with WorkDir(workdir_path, {**to_dict(settings), "weights": source.fingerprint}) as workdir:
        summary = workdir.summary()
        if summary is None:
            summary = _quantize(source, settings, workdir, stopwatch, perplexity_float, prepare)
            workdir.append_metrics([report.json_numbers(summary)])
        else:
            print(f"{workdir.path} holds the finished run of this config; nothing is left to do\n")
        metrics = workdir.metrics()
    for name in ("perplexity_float", "perplexity_quantized"):
        summary[name] = float(summary[name])
    rows, tuned = ([row for row in metrics if row["kind"] == kind] for kind in ("layer", "block"))
    title = f"{source.name}, {summary['bits_per_value']:.3f} bits per value"
    report.plot(rows, title, workdir.path / "report.png", tuned)
    print(report.layer_table(rows))
    print()
    print(report.summary_text(summary, tuned))
    print(f"{'written to':>15s}  {workdir.path}")
    return summary


def _quantize(
    source: ModelSource,
    settings: RunSettings,
    workdir: WorkDir,
    stopwatch: Stopwatch,
    perplexity_float: float | None,
    prepare: Callable[[WorkDir], None] | None,
) -> dict[str, Any]:
    """Quantizes and evaluates; returns the summary."""
    goes_on = workdir.begun()
    if prepare is not None:
        prepare(workdir)
    # Both texts are read before hours of work: what is wrong with them shows at once.
    with stopwatch.stage("read text"):
        held_out, tokens = texts(source, settings, workdir)
    order = range(source.config.num_hidden_layers)
    of_float = None
    if perplexity_float is None:
        of_float = float_evaluation(source, settings, workdir, held_out, stopwatch)
    riders = () if of_float is None else (of_float,)
    blocks = quantize_model(source, settings, workdir, tokens, stopwatch, riders)
    blocks.finalize()
    if of_float is not None:
        walk(source, [of_float], order, stopwatch)  # where a killed run has left it behind
        perplexity_float = of_float.perplexity()
    packed = PackedCheckpoint(workdir.checkpoint)
    with Progress(len(order), "evaluate quantized", "block") as progress:
        files = workdir.evaluation("quantized")
        after = perplexity(
            packed,
            held_out,
            settings.evaluation.batch_size,
            progress.advance,
            files.directory,
            stopwatch,
        )
    manifest = packed.manifest
    return {
        "kind": "summary",
        "bits_per_value": manifest["bits_per_value"],
        "num_layers": len(manifest["layers"]),
        "quantized_bytes": manifest["quantized_bytes"],
        "embedding_bytes": manifest["embedding_bytes"],
        "dense_bytes": manifest["dense_bytes"],
        "checkpoint_bytes": directory_bytes(workdir.checkpoint),
        "perplexity_float": perplexity_float,
        "perplexity_quantized": after,
        "evaluation": f"{describe(settings.evaluation.dataset, held_out)}, {PRECISION}",
        "calibration": describe(settings.calibration.dataset, tokens),
        # What follows is of this process alone, and so are the rows of blocks from here on.
        "resumed_at": blocks.finished if goes_on else None,
        **stopwatch.summary(),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def texts(
    source: ModelSource, settings: RunSettings, workdir: WorkDir
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the held-out text and of the calibration text, kept in the work directory."""
    held_out, tokens = workdir.load_tokens("held_out"), workdir.load_tokens()
    known = held_out is not None, tokens is not None
    held_out = held_out if known[0] else evaluation_tokens(source, settings)
    tokens = tokens if known[1] else calibration_tokens(source, settings)
    # Both are there: what is kept from here on was made with a config that is not refused. The
    # tokens come first, because the work directory counts as begun with them.
    if not known[1]:
        workdir.save_tokens(tokens)
    if not known[0]:
        workdir.save_tokens(held_out, "held_out")
    return held_out, tokens


def float_evaluation(
    source: ModelSource,
    settings: RunSettings,
    workdir: WorkDir,
    held_out: np.ndarray,
    stopwatch: Stopwatch,
) -> Evaluation:
    """The evaluation of the float model, which rides in a walk over its blocks.

    Raises:
      FullDiskError: there is no room for its files.
    """
    files = workdir.evaluation("float")
    parts = source.config, source.outer(), held_out, settings.evaluation.batch_size
    evaluation = Evaluation(*parts, files, stopwatch)
    check_room(files.directory, evaluation.peak_bytes - directory_bytes(files.directory))
    return evaluation


def check_plan(source: ModelSource, settings: RunSettings) -> None:
    """Refuses, before anything is made, what the model does not allow.

    Raises:
      ValueError: windows beyond its positions, or token weights or a budget that cannot be.
    """
    check_seqlen(source, "calibration", settings.calibration.seqlen)
    check_seqlen(source, "evaluation", settings.evaluation.seqlen)
    groups = settings.weight_groups
    if not groups:
        return
    allocated = settings.allocation.bits_per_value > 0
    gradients.check_groups(source.config, groups)
    used = settings.candidates if allocated else [settings.method_settings]
    check_row_groups(layer_shapes(source.config), used, groups)
    if allocated:
        allocation.check_budget(source.config, settings)


def evaluate(checkpoint: str | None, model: str | None, **overrides: Any) -> float:
    """Prints and returns the perplexity of a packed checkpoint or of a float model.

    Args:
      checkpoint, model: exactly one of them: a checkpoint directory, or a model as in config.model.
      overrides: fields of EvaluationSettings; None leaves what the checkpoint was made with.
    """
    if (checkpoint is None) == (model is None):
        raise ValueError("pass either --checkpoint=DIR or --model=NAME")
    source = PackedCheckpoint(checkpoint) if checkpoint else open_source(model)
    # An imported checkpoint was made without a text.
    made_with = source.manifest["config"].get("evaluation", {}) if checkpoint else {}
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = RunSettings(evaluation=evaluation_settings(made_with, given))
    check_seqlen(source, "evaluation", settings.evaluation.seqlen, flag="--seqlen")
    windows = evaluation_tokens(source, settings)
    value = evaluate_source(source, windows, settings.evaluation.batch_size, source.name)
    print(
        f"perplexity {value:.4f} on {describe(settings.evaluation.dataset, windows)}, {PRECISION}"
    )
    return value


def calibration_tokens(source: ModelSource, settings: RunSettings) -> np.ndarray:
    """Random windows (n, T) of the calibration text."""
    c = settings.calibration
    return calibration_windows(
        source.tokenizer,
        documents(c.dataset, "train"),
        num_windows=c.num_windows,
        seqlen=c.seqlen,
        seed=c.seed,
        per_document=c.dataset == "c4",
        vocab_size=source.config.vocab_size,
    )


def evaluation_tokens(source: ModelSource, settings: RunSettings) -> np.ndarray:
    """Consecutive windows (n, T) of the held-out text."""
    e = settings.evaluation
    return evaluation_windows(
        source.tokenizer,
        documents(e.dataset, "test"),
        seqlen=e.seqlen,
        max_windows=e.num_windows or None,
        vocab_size=source.config.vocab_size,
    )


def evaluate_source(source: ModelSource, windows: np.ndarray, batch_size: int, name: str) -> float:
    """Perplexity with a progress bar."""
    with Progress(source.config.num_hidden_layers, f"evaluate {name}", "block") as progress:
        return perplexity(source, windows, batch_size, progress.advance)


def check_seqlen(source: ModelSource, section: str, seqlen: int, flag: str = "") -> None:
    """Raises ValueError for windows beyond the model's positions; `flag` is what sets them."""
    limit = source.config.max_position_embeddings
    if seqlen > limit:
        raise ValueError(
            f"{section}.seqlen={seqlen} is beyond the {limit} positions of {source.name}; "
            f"set {flag or f'--config.{section}.seqlen'}={limit} or less"
        )


def describe(dataset: str, windows: np.ndarray) -> str:
    return f"{len(windows)} x {windows.shape[1]} tokens of {dataset}"
