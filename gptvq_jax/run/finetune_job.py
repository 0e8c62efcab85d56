"""Tunes a packed checkpoint as a whole, and evaluates it: what scripts/finetune.py calls."""

import dataclasses
from collections.abc import Collection
from typing import Any

from gptvq_jax.config import RunSettings, from_config
from gptvq_jax.console import report
from gptvq_jax.console.freed_memory import kept_memory
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch, peak_memory_bytes
from gptvq_jax.core.divergence import FIGURES
from gptvq_jax.files.disk_space import directory_bytes
from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.activations import FLOAT32, Activations, writing
from gptvq_jax.run.compare import comparison, write_figures
from gptvq_jax.run.device_memory import explained
from gptvq_jax.run.evaluate import Evaluation, precision_text
from gptvq_jax.run.overrides import ignored
from gptvq_jax.run.text import (
    calibration_protocol,
    calibration_text,
    check_seqlen,
    describe,
    evaluation_tokens,
    protocol,
)
from gptvq_jax.run.tune_stage import tune
from gptvq_jax.run.walk import walk
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.storage.checkpoint import PackedCheckpoint

_SECTIONS = ("finetune", "evaluation")  # of a config, that count here
_OF_TEXT = ("datasets", "dataset_weights", "seqlen", "bos")  # of calibration


def finetune(
    checkpoint: str,
    workdir_path: str,
    config: Any,
    model: str | None = None,
    given: Collection[str] = (),
    command: str = "",
) -> dict[str, Any]:
    """Tunes a checkpoint against its float model, evaluates both, and writes the tuned one.

    Args:
      checkpoint: directory of a packed checkpoint, which stays as it is.
      workdir_path: directory for everything that is written, the new checkpoint in "checkpoint";
        an earlier tuning in it is resumed.
      config: ConfigDict, of which `finetune`, `evaluation` and the text of `calibration` count.
      model: the float model, as `open_source` takes it; None: what the checkpoint was made from.
      given: fields of the config that the command line names; each must have an effect.
      command: the command line, to be noted in the work directory; "": none.

    Returns:
      The summary, which is also printed.

    Raises:
      ValueError, FileNotFoundError: bad input, in one line that names the flag, field or file.
    """
    with kept_memory():  # before JAX begins its threads
        return _run(checkpoint, workdir_path, config, model, given, command)


def _run(
    checkpoint: str,
    workdir_path: str,
    config: Any,
    model: str | None,
    given: Collection[str],
    command: str,
) -> dict[str, Any]:
    stopwatch = Stopwatch()
    settings = from_config(config)
    settings = dataclasses.replace(settings, tune=dataclasses.replace(settings.tune, model=True))
    _check_given(settings, given)
    packed = PackedCheckpoint(checkpoint)
    with stopwatch.stage("open model"):
        source = float_model(packed, checkpoint, model)
    for section, seqlen in (
        ("calibration", settings.calibration.seqlen),
        ("evaluation", settings.evaluation.seqlen),
    ):
        check_seqlen(source, section, seqlen)
    key = {**_counted(settings), "weights": source.fingerprint, "checkpoint": packed.fingerprint}
    with explained(stopwatch), WorkDir(workdir_path, key) as workdir:
        summary = workdir.summary()
        if summary is None:
            if command:
                workdir.note_command(command)
            summary = _finetune(source, packed, settings, workdir, stopwatch)
            workdir.append_metrics([report.json_numbers(summary)])
        else:
            print(f"{workdir.path} holds the finished tuning of this config; nothing is left to do")
        workdir.drop_evaluations()
        workdir.drop_tuning()
    for name in ("perplexity_float", "perplexity_quantized", "perplexity_untuned"):
        summary[name] = float(summary[name])
    print(report.summary_text(summary))
    print(f"{'written to':>15s}  {workdir.path}")
    return summary


def float_model(packed: PackedCheckpoint, directory: str, model: str | None) -> ModelSource:
    """The model that a checkpoint was made from.

    Args:
      packed: the checkpoint.
      directory: of it, for messages.
      model: as `open_source` takes it; None: as the checkpoint's config names it.

    Raises:
      ValueError, FileNotFoundError: it is not there, or another one.
    """
    name = model or packed.manifest["config"].get("model")
    if not isinstance(name, str):
        raise ValueError(f"{directory} does not say where its float model is; pass it with --model")
    try:
        source = open_source(name)
    except (OSError, ValueError) as error:
        if model is not None:
            raise
        raise type(error)(
            f"the float model of {directory}, {name!r}, cannot be opened: {error}; pass the same "
            "model with --model"
        ) from None
    made_from = packed.manifest["source"]
    if source.fingerprint != made_from["fingerprint"]:
        raise ValueError(
            f"{name} ({source.name}, {source.fingerprint[:23]}) is not the model that {directory} "
            f"was made from, {made_from['name']} ({made_from['fingerprint'][:23]}); pass that one "
            "with --model"
        )
    return source


def _finetune(
    source: ModelSource,
    packed: PackedCheckpoint,
    settings: RunSettings,
    workdir: WorkDir,
    stopwatch: Stopwatch,
) -> dict[str, Any]:
    """Tunes and evaluates; returns the summary."""
    with stopwatch.stage("read text"):
        held_out = evaluation_tokens(source, settings)
    manifest = packed.manifest
    made_with = {**manifest["config"], **_counted(settings)}
    if "calibration" in manifest["config"]:  # what codes were fitted to is said there
        made_with["calibration"] = manifest["config"]["calibration"]
    row = tune(source, packed, settings, workdir, made_with, stopwatch)
    tuned = PackedCheckpoint(workdir.checkpoint)
    e, evaluations = settings.evaluation, {}
    for name, model in (("float", source), ("untuned", packed), ("tuned", tuned)):
        files = workdir.evaluation("float" if name == "float" else "quantized")
        of_model = model, held_out, e.batch_size, files, stopwatch
        evaluation = Evaluation(*of_model, products=e.products)
        evaluation.check_room()
        depth = model.config.num_hidden_layers
        with Progress(depth, f"evaluate {name}", "block") as progress:
            walk(model, [evaluation], range(depth), stopwatch, progress)
        evaluations[name] = evaluation
    figures = (len(held_out), held_out.shape[1] - 1, len(FIGURES))
    compared = {}
    for name in ("untuned", "tuned"):  # whose figures stay
        with (
            Progress(len(held_out), f"compare {name}", "window") as progress,
            writing(workdir.token_figures, figures, FLOAT32) as out,
        ):
            write_figures(evaluations[name], evaluations["float"], out, progress)
        compared[name] = comparison(Activations(workdir.token_figures)[:])
    before, after = (
        compared[name]["log_perplexity_ratio"]["value"] for name in ("untuned", "tuned")
    )
    read = _tuned_on(settings)
    return {
        "kind": "summary",
        "bits_per_value": tuned.manifest["bits_per_value"],
        "num_layers": len(tuned.manifest["layers"]),
        "quantized_bytes": tuned.manifest["quantized_bytes"],
        "embedding_bytes": tuned.manifest["embedding_bytes"],
        "dense_bytes": tuned.manifest["dense_bytes"],
        "checkpoint_bytes": directory_bytes(workdir.checkpoint),
        "perplexity_float": compared["tuned"]["perplexity_float"]["value"],
        "perplexity_untuned": compared["untuned"]["perplexity"]["value"],
        "perplexity_quantized": compared["tuned"]["perplexity"]["value"],
        "rise_removed": 1 - after / before if before > 0 else None,
        "comparison": compared["tuned"],
        "evaluation": f"{describe(e.dataset, held_out)}, {precision_text(e.products)}",
        "protocol": protocol(source, e.dataset, held_out),
        "calibration": f"tuned on {calibration_text(read)}",
        "calibration_protocol": read,
        "tuning": row,
        **stopwatch.summary(),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _tuned_on(settings: RunSettings) -> dict[str, Any]:
    """What the tuning has read, as a calibration's protocol."""
    f = settings.finetune
    text = dict(num_windows=f.num_windows, held_out=f.held_out, seed=f.seed)
    return calibration_protocol(dataclasses.replace(settings.calibration, **text))


def _counted(settings: RunSettings) -> dict[str, Any]:
    """The part of a config that a tuning by itself depends on."""
    counted = {name: dataclasses.asdict(getattr(settings, name)) for name in _SECTIONS}
    of_text = dataclasses.asdict(settings.calibration)
    counted["calibration"] = {name: of_text[name] for name in _OF_TEXT}
    return counted


def _check_given(settings: RunSettings, given: Collection[str]) -> None:
    """Raises ValueError for a field that does not count here."""
    reasons = ignored(settings)
    counted = {f"calibration.{name}" for name in _OF_TEXT}
    for field in given:
        if field.partition(".")[0] not in _SECTIONS and field not in counted:
            instead = "; name the float model with --model" if field == "model" else ""
            raise ValueError(
                f"--config.{field} has no effect on a checkpoint whose codes are there; "
                f"finetune.*, evaluation.* and calibration.{', '.join(_OF_TEXT)} have{instead}"
            )
        if field in reasons:
            raise ValueError(f"--config.{field} has no effect {reasons[field]}")
