"""The stage that tunes a packed checkpoint as a whole: of `finetune`, and of a run's `tune.model`.

The float model's last hidden states are made once, before the first step. The steps are those of
tune_model.py; what came of them is written as another checkpoint, in the work directory of the run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptvq_jax.config import RunSettings
from gptvq_jax.console import report
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.files import durable
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.activations import BFLOAT16, Activations
from gptvq_jax.run.embedding import head_on_device
from gptvq_jax.run.evaluate import Evaluation
from gptvq_jax.run.stream_files import StreamFiles
from gptvq_jax.run.student import Student, Teacher
from gptvq_jax.run.text import calibration_tokens
from gptvq_jax.run.tune_model import Text, moves, tune_model
from gptvq_jax.run.tune_state import last_step
from gptvq_jax.run.walk import walk
from gptvq_jax.run.workdir import TUNE_KINDS, WorkDir
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter
from gptvq_jax.storage.manifest import KEPT_DENSE

_TOKENS = "tuning/tokens"


def tune(
    source: ModelSource,
    packed: PackedCheckpoint,
    settings: RunSettings,
    workdir: WorkDir,
    made_with: Mapping[str, Any],
    stopwatch: Stopwatch,
) -> dict[str, Any]:
    """Tunes and writes `workdir.checkpoint`; resumes where it can.

    Args:
      source: the float model.
      packed: another checkpoint of it.
      settings: `finetune`, and the text of `calibration`.
      workdir: of the run; its metrics get rows of TUNE_KINDS.
      made_with: the config that the new manifest will hold.
      stopwatch: receives the seconds of every stage.

    Returns:
      The row of kind "tuned".

    Raises:
      ValueError: the loss is not finite.
      FullDiskError: there is no room.
    """
    writer = CheckpointWriter(workdir.checkpoint, packed.manifest["dense"]["norm/scale"]["dtype"])
    f = settings.finetune
    durable.make_directory(workdir.tuning)
    with stopwatch.stage("read text"):
        tokens = tuning_tokens(source, settings, workdir)
    teacher, outputs = _teacher(source, tokens, workdir, stopwatch)
    with stopwatch.stage("load model"):
        student = Student(packed, teacher, f.micro_batch, stopwatch)
    _drop_rows(workdir)
    with Progress(f.steps, "tune model", "step") as progress:
        tuned = tune_model(
            student,
            Text(tokens, outputs),
            f,
            workdir.tuning,
            lambda row: workdir.append_metrics([report.json_numbers(row)]),
            progress,
            stopwatch,
        )
    with stopwatch.stage("save"):
        states = tuned.states
        for index in range(writer.finished_blocks(), packed.config.num_hidden_layers):
            block = student.stored(packed.packed_block(index), states, f"layers_{index}/")
            writer.write_block(index, block)
        writer.write_outer(student.stored(packed.packed_outer(), states, ""))
        writer.write_tokenizer(packed.tokenizer, packed.companions())
        writer.finalize(
            config=dict(made_with),
            model_config=packed.config,
            source_name=source.name,
            source_fingerprint=source.fingerprint,
            kept_dense=packed.manifest.get(KEPT_DENSE, []),
        )
    others = [r for r in workdir.metrics() if r["kind"] not in TUNE_KINDS[2:]]
    before = next(r["held_out"] for r in others if r["kind"] == "tune" and "held_out" in r)
    row = {"kind": "tuned", "held_out_before": before, **tuned.summary}
    workdir.keep_metrics([*others, *moves(student, states), row])
    return row


def tuning_tokens(source: ModelSource, settings: RunSettings, workdir: WorkDir) -> np.ndarray:
    """Windows (n, T) that are tuned on, and after them those that are held out."""
    tokens = workdir.load_tokens(_TOKENS)
    if tokens is None:
        f = settings.finetune
        text = dict(num_windows=f.num_windows, held_out=f.held_out, seed=f.seed, statistics="")
        of_text = dataclasses.replace(settings.calibration, **text)
        tokens = calibration_tokens(source, dataclasses.replace(settings, calibration=of_text))
        workdir.save_tokens(tokens, _TOKENS)
    return tokens


def _teacher(
    source: ModelSource, tokens: np.ndarray, workdir: WorkDir, stopwatch: Stopwatch
) -> tuple[Teacher, Activations]:
    """The float model's head, and what its last block leaves of the text, once for all steps."""
    files = StreamFiles.opened(workdir.tuning)
    outputs = Evaluation(source, tokens, 2, files, stopwatch, BFLOAT16)
    outputs.check_room()
    depth = source.config.num_hidden_layers
    if not outputs.finished:
        with Progress(depth, "float model", "block") as progress:
            walk(source, [outputs], range(depth), stopwatch, progress)
    head = head_on_device(source.config, source.outer())
    return Teacher(source.config, head), outputs.outputs()


def _drop_rows(workdir: WorkDir) -> None:
    """Rows of steps behind the state that will be gone on from are made again."""
    done = last_step(workdir.tuning)
    rows = workdir.metrics()
    kept = [r for r in rows if r["kind"] not in TUNE_KINDS or 0 <= r.get("step", -1) <= done]
    if len(kept) < len(rows):
        workdir.keep_metrics(kept)
