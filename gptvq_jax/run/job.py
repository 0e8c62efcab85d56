"""The main job: quantize, evaluate, report. What scripts/quantize.py calls."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from gptvq_jax.config import RunSettings, from_config, to_dict
from gptvq_jax.console import layer_plot, report
from gptvq_jax.console.freed_memory import kept_memory
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch, peak_memory_bytes
from gptvq_jax.core.divergence import FIGURES
from gptvq_jax.files.disk_space import directory_bytes
from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run import allocation, gradients, spread
from gptvq_jax.run.activations import FLOAT32, Activations, file_bytes, writing
from gptvq_jax.run.compare import comparison, write_figures
from gptvq_jax.run.device_memory import explained
from gptvq_jax.run.disk import check_disk
from gptvq_jax.run.evaluate import Evaluation, precision_text
from gptvq_jax.run.formats import check_formats, check_given, num_quantized
from gptvq_jax.run.hosts import check_same
from gptvq_jax.run.memory_check import check_memory
from gptvq_jax.run.overrides import settle
from gptvq_jax.run.passes import quantize_model
from gptvq_jax.run.statistics_file import Statistics, statistics_text
from gptvq_jax.run.stream_files import StreamFiles
from gptvq_jax.run.text import (
    calibration_protocol,
    calibration_text,
    calibration_tokens,
    check_seqlen,
    describe,
    evaluation_tokens,
    protocol,
)
from gptvq_jax.run.tune_stage import tune, tuning_tokens
from gptvq_jax.run.walk import walk
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.storage.checkpoint import PackedCheckpoint


def quantize(
    config: Any,
    workdir_path: str,
    shared_evaluation: str | None = None,
    given: Collection[str] = (),
    prepare: Callable[[WorkDir], None] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Runs one config to its end and returns the summary, which is also printed.

    Args:
      config: ConfigDict, as from `default_config`.
      workdir_path: directory for everything the run writes; an earlier run in it is resumed.
      shared_evaluation: directory of what the float model makes of the held-out text, which several
        runs share, one at a time: it is read there, or made where it is missing, and stays. By
        default it is in the work directory, evaluation/float, until the summary is written; where
        that of another run on the same text and model is found there, as a hard link say, it is
        not made again.
      given: fields of the config that the command line names; each must have an effect.
      prepare: called with the work directory before the first pass, unless the run is finished: it
        may put there what other runs have made, which the passes then find done.
      command: the command line, to be noted in the work directory; "": none.

    Raises:
      ValueError, FileNotFoundError: bad input, in one line that names the field or file.
      DeviceMemoryError: a device has too little memory; names what lowers the need.
    """
    stopwatch = Stopwatch()
    config, note = settle(config, given)
    settings = from_config(config)
    if note:
        logging.warning("%s", note)
    with stopwatch.stage("open model"):
        source = open_source(settings.model)
    check_plan(source, settings)
    check_given(settings, source.config, given)
    key = {**to_dict(settings), "weights": source.fingerprint}
    if settings.calibration.statistics:
        key["statistics"] = Statistics(settings.calibration.statistics).digest
    check_same(key)
    if jax.process_count() > 1 and settings.tune.model:
        raise ValueError(
            "tune.model is the work of one process; leave out --distributed, or tune afterwards by "
            "gptvq_jax finetune"
        )
    with explained(stopwatch), WorkDir(workdir_path, key) as workdir:
        summary = workdir.summary()
        if summary is None:
            if command:
                workdir.note_command(command)
            summary = _quantize(source, settings, workdir, stopwatch, shared_evaluation, prepare)
            workdir.append_metrics([report.json_numbers(summary)])
        else:
            print(f"{workdir.path} holds the finished run of this config; nothing is left to do\n")
        workdir.drop_evaluations()
        workdir.drop_tuning()
        metrics = workdir.metrics()
    for name in ("perplexity_float", "perplexity_quantized"):
        summary[name] = float(summary[name])
    for figure in summary.get("comparison", {}).values():
        figure.update({k: None if v is None else float(v) for k, v in figure.items()})
    rows, tuned, outer = (
        [row for row in metrics if row["kind"] == kind] for kind in ("layer", "block", "outer")
    )
    title = f"{source.name}, {summary['bits_per_value']:.3f} bits per value"
    layer_plot.plot(rows, title, workdir.path / "report.png", tuned)
    print(report.layer_table([*outer, *rows]))
    print()
    print(report.summary_text(summary, tuned, [*outer, *rows]))
    print(f"{'written to':>15s}  {workdir.path}")
    return summary


def _quantize(
    source: ModelSource,
    settings: RunSettings,
    workdir: WorkDir,
    stopwatch: Stopwatch,
    shared: str | None,
    prepare: Callable[[WorkDir], None] | None,
) -> dict[str, Any]:
    """Quantizes and evaluates; returns the summary."""
    goes_on = workdir.begun()
    if prepare is not None:
        prepare(workdir)
    # Both texts are read before hours of work: what is wrong with them shows at once.
    with stopwatch.stage("read text"):
        held_out, tokens = texts(source, settings, workdir)
        if settings.tune.model:
            tuning_tokens(source, settings, workdir)
    if not goes_on and prepare is None and shared is None:
        check_disk(source.config, settings, workdir, len(held_out))
    calibration = settings.calibration
    if line := spread.line(calibration.num_windows, calibration.held_out, len(held_out)):
        print(line)
    of_float = float_evaluation(source, settings, workdir, held_out, stopwatch, shared)
    blocks = quantize_model(source, settings, workdir, tokens, stopwatch, [of_float])
    blocks.finalize()
    if not of_float.finished:  # where a killed run has left it behind
        _evaluate(of_float, "float")
    tuning = {}
    if settings.tune.model:
        untuned = PackedCheckpoint(workdir.quantized)
        config = untuned.manifest["config"]
        with kept_memory():
            row = tune(source, untuned, settings, workdir, config, stopwatch)
        tuning = {"tuning": row}
    packed = PackedCheckpoint(workdir.checkpoint)
    e, files = settings.evaluation, workdir.evaluation("quantized")
    of_packed = packed, held_out, e.batch_size, files, stopwatch
    quantized = Evaluation(*of_packed, products=e.products)
    figures = (len(held_out), held_out.shape[1] - 1, len(FIGURES))
    quantized.check_room(file_bytes(figures, FLOAT32))
    _evaluate(quantized, "quantized")
    with (
        Progress(len(held_out), "compare", "window") as progress,
        writing(workdir.token_figures, figures, FLOAT32) as out,
    ):
        write_figures(quantized, of_float, out, progress)
    compared = comparison(Activations(workdir.token_figures)[:])
    manifest = packed.manifest
    return {
        "kind": "summary",
        "bits_per_value": manifest["bits_per_value"],
        "num_layers": len(manifest["layers"]),
        "quantized_bytes": manifest["quantized_bytes"],
        "embedding_bytes": manifest["embedding_bytes"],
        "dense_bytes": manifest["dense_bytes"],
        "checkpoint_bytes": directory_bytes(workdir.checkpoint),
        "perplexity_float": compared["perplexity_float"]["value"],
        "perplexity_quantized": compared["perplexity"]["value"],
        "comparison": compared,
        "evaluation": f"{describe(e.dataset, held_out)}, {precision_text(e.products)}",
        "protocol": protocol(source, settings.evaluation.dataset, held_out),
        **_calibrated(settings),
        **tuning,
        # What follows is of this process alone, and so are the rows of blocks from here on.
        "resumed_at": blocks.finished if goes_on else None,
        **stopwatch.summary(),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def texts(
    source: ModelSource, settings: RunSettings, workdir: WorkDir
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the held-out text and of the calibration text, kept in the work directory.

    A run that starts from statistics has none of the latter.
    """
    held_out, tokens = workdir.load_tokens("held_out"), workdir.load_tokens()
    known = held_out is not None, tokens is not None
    held_out = held_out if known[0] else evaluation_tokens(source, settings)
    if not known[1]:
        tokens = calibration_tokens(source, settings)
    # Both are there: what is kept from here on was made with a config that is not refused. The
    # tokens come first, because the work directory counts as begun with them.
    if not known[1]:
        workdir.save_tokens(tokens)
    if not known[0]:
        workdir.save_tokens(held_out, "held_out")
    return held_out, tokens


def _calibrated(settings: RunSettings) -> dict[str, Any]:
    """What a summary says of the calibration."""
    file = settings.calibration.statistics
    if file:
        record = Statistics(file).record
        text = f"{file}, of {statistics_text(record)}"
        return {"calibration": text, "calibration_protocol": record}
    read = calibration_protocol(settings.calibration)
    return {"calibration": calibration_text(read), "calibration_protocol": read}


def float_evaluation(
    source: ModelSource,
    settings: RunSettings,
    workdir: WorkDir,
    held_out: np.ndarray,
    stopwatch: Stopwatch,
    shared: str | None = None,
) -> Evaluation:
    """That of the float model, which rides in a walk over its blocks.

    Args:
      source, settings, workdir, stopwatch: of the run.
      held_out: windows (n, T).
      shared: directory of its files, as `quantize` takes it; None: in the work directory.

    Raises:
      FullDiskError: there is no room for its files.
    """
    files = StreamFiles.opened(Path(shared)) if shared else workdir.evaluation("float")
    e = settings.evaluation
    of_float = source, held_out, e.batch_size, files, stopwatch
    evaluation = Evaluation(*of_float, products=e.products)
    evaluation.check_room()
    return evaluation


def _evaluate(evaluation: Evaluation, name: str) -> None:
    """Takes the held-out text through a model, from where a killed run has left it."""
    depth = evaluation.config.num_hidden_layers
    with Progress(depth, f"evaluate {name}", "block") as progress:
        walk(evaluation.source, [evaluation], range(depth), evaluation.stopwatch, progress)


def check_plan(source: ModelSource, settings: RunSettings) -> None:
    """Refuses, before anything is made, what the model does not allow.

    Raises:
      ValueError: windows beyond its positions, statistics of another model, a recipe that does not
        fit it, or token weights or a budget that cannot be.
    """
    if settings.calibration.statistics:
        blocks = num_quantized(settings, source.config)
        statistics = Statistics(settings.calibration.statistics)
        statistics.check(source.name, source.fingerprint, blocks)
        if getattr(settings.method_settings, "judged", False) and not statistics.has_held_out:
            raise ValueError(
                f"vq.polish_judge='held_out' needs windows that are held out, and "
                f"{settings.calibration.statistics} has none; make it with calibration.held_out"
            )
    else:
        check_seqlen(source, "calibration", settings.calibration.seqlen)
    check_seqlen(source, "evaluation", settings.evaluation.seqlen)
    if settings.calibration.expert_tokens and not any(
        block.experts for block in source.config.block_counts()
    ):
        raise ValueError(
            "calibration.expert_tokens has no effect: the model has no experts; leave it out"
        )
    groups, allocated = settings.weight_groups, settings.allocation.bits_per_value > 0
    if groups:
        gradients.check_groups(source.config, groups)
    check_formats(settings, source.config)
    if allocated:
        allocation.check_budget(source.config, settings)
    check_memory(source.config, settings)
