"""The job of scripts/calibrate.py: statistics of a float model, made from a text or added up."""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptvq_jax.config import CALIBRATION_TEXT, RunSettings, from_config
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.files.disk_space import check_room
from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.activations import file_bytes
from gptvq_jax.run.context import Context
from gptvq_jax.run.device_memory import explained
from gptvq_jax.run.float_moments import FloatMoments, load_sums, moments_bytes, to_arrays
from gptvq_jax.run.formats import num_quantized
from gptvq_jax.run.forward import Forward
from gptvq_jax.run.statistics_file import FORMAT, Statistics, statistics_text, write
from gptvq_jax.run.text import (
    calibration_protocol,
    calibration_tokens,
    check_seqlen,
)
from gptvq_jax.run.walk import walk
from gptvq_jax.run.workdir import WorkDir

# What they depend on.
_OF_CALIBRATION = (*CALIBRATION_TEXT, "products", "model_products")
_FIELDS = ("model", "num_blocks", *(f"calibration.{name}" for name in _OF_CALIBRATION))


def calibrate(config: Any, output: str, given: Collection[str] = ()) -> dict[str, Any]:
    """Writes the statistics of a float model on a calibration text; returns their record.

    What a killed run needs to go on is in OUTPUT.work, which is removed in the end.

    Args:
      config: ConfigDict, of which the model, num_blocks and the calibration text count.
      output: the file; one with the same statistics is left as it is.
      given: fields that the command line names; each must have an effect.

    Raises:
      ValueError, FileNotFoundError: bad input, in one line that names the field or file.
      FullDiskError: there is no room.
    """
    for field in given:
        if field not in _FIELDS:
            raise ValueError(
                f"--config.{field} has no effect on statistics, which depend on "
                f"{', '.join(_FIELDS)}; leave it out"
            )
    settings, path = from_config(config), Path(output)
    if settings.calibration.statistics:
        raise ValueError("calibration.statistics must be '' where statistics are made")
    source = open_source(settings.model)
    check_seqlen(source, "calibration", settings.calibration.seqlen)
    record = {
        "weights": source.fingerprint,
        "model": source.name,
        "blocks": num_quantized(settings, source.config),
        "parts": [calibration_protocol(settings.calibration)],
    }
    work = path.with_name(f"{path.name}.work")
    if path.exists():
        if Statistics(path).record != {"format": FORMAT, **record}:
            raise ValueError(f"{path} holds other statistics; name another file with --output")
        shutil.rmtree(work, ignore_errors=True)  # where a kill came just before that
        print(f"{path} holds these statistics; nothing is left to do")
        return record
    key = {name: value for name, value in record.items() if name != "parts"}
    key["calibration"] = {n: getattr(settings.calibration, n) for n in _OF_CALIBRATION}
    with WorkDir(work, key) as workdir:
        _make(source, settings, workdir, record["blocks"])
        size = _all_moments_bytes(source, _unweighted(settings), record["blocks"])
        check_room(path.absolute().parent, size)
        with Progress(record["blocks"], "write", "block") as progress:
            write(path, record, _counted(_sums_of(workdir, record["blocks"]), progress), size)
    shutil.rmtree(work)
    _tell(path, record)
    return record


def add(files: Sequence[str], output: str) -> dict[str, Any]:
    """Writes the sums of the statistics of one model on several texts; returns their record.

    Args:
      files: of `calibrate` or `add`, two at least.
      output: the file.

    Raises:
      ValueError, FileNotFoundError: files that do not add up, in one line that says why.
      FullDiskError: there is no room.
    """
    if len(files) < 2:
        raise ValueError(f"--add={files[0]} alone is no sum; give --add once for each file")
    path, found = Path(output), [Statistics(file) for file in files]
    if path.exists():
        raise ValueError(f"{path} is there already; name another file with --output")
    first = found[0]
    for other in found[1:]:
        other.check(str(first.path), first.record["weights"], first.record["blocks"])
        if other.record["blocks"] != first.record["blocks"]:
            raise ValueError(
                f"{first.path} has {first.record['blocks']} blocks and {other.path} "
                f"{other.record['blocks']}; make both with the same --config.num_blocks"
            )
    _check_parts(found)
    parts = [part for of in found for part in of.record["parts"]]
    record = {**{n: first.record[n] for n in ("weights", "model", "blocks")}, "parts": parts}
    size = max(of.path.stat().st_size for of in found)
    check_room(path.absolute().parent, size)
    with Progress(record["blocks"], "add", "block") as progress:
        sums = (_added([of.arrays(i) for of in found]) for i in range(record["blocks"]))
        write(path, record, _counted(sums, progress), size)
    _tell(path, record)
    return record


def _make(source: ModelSource, settings: RunSettings, workdir: WorkDir, blocks: int) -> None:
    """Leaves the sums of each block in the work directory, going on where a run was stopped."""
    tokens = workdir.load_tokens()
    if tokens is None:
        tokens = calibration_tokens(source, settings)
        workdir.save_tokens(tokens)
    stopwatch, settings = Stopwatch(), _unweighted(settings)
    context = Context(source, settings, workdir, None, stopwatch)
    moments = FloatMoments(context, blocks, keep_float=False)
    done = moments.position(range(blocks))
    stream = file_bytes((*tokens.shape, source.config.hidden_size))
    room = min(3, blocks - done + 1) * stream + _all_moments_bytes(source, settings, blocks)
    workdir.check_room(room, "moments/*", "activations/*")
    forward = Forward(context, tokens, blocks, done, want_middle=False)
    with explained(stopwatch), Progress(blocks, "statistics", "block") as progress:
        walk(source, [forward, moments], range(blocks), stopwatch, progress)


def _all_moments_bytes(source: ModelSource, settings: RunSettings, blocks: int) -> int:
    counts = source.config.block_counts(blocks).items()
    return sum(count * moments_bytes(block, settings) for block, count in counts)


def _unweighted(settings: RunSettings) -> RunSettings:
    """Settings of a pass over the same text, in which every token counts alike."""
    c = dataclasses.replace(
        settings.calibration, gradient_groups=0, inputs="float", asymmetry=0.0, statistics=""
    )
    return RunSettings(model=settings.model, num_blocks=settings.num_blocks, calibration=c)


def _sums_of(workdir: WorkDir, blocks: int) -> Iterator[dict[str, np.ndarray]]:
    for index in range(blocks):
        yield to_arrays(load_sums(workdir, index))


def _counted(blocks: Iterator[Any], progress: Progress) -> Iterator[Any]:
    for index, arrays in enumerate(blocks):
        yield arrays
        progress.advance(f"block {index}")


def _added(blocks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Sums and counts of all files; a file that held nothing out adds nothing to that."""
    names = dict.fromkeys(name for arrays in blocks for name in arrays)
    found = {name: [arrays[name] for arrays in blocks if name in arrays] for name in names}
    return {name: np.asarray(sum(terms)) for name, terms in found.items()}


def _check_parts(found: Sequence[Statistics]) -> None:
    """Refuses files of which one was fitted to what another holds out, or the same text twice."""
    read = [
        (of.path, part, text["dataset"], text["held_out_windows"])
        for of in found
        for part in of.record["parts"]
        for text in part["texts"]
    ]
    for first, second in itertools.combinations(read, 2):
        (where, one, dataset, here), (there, other, same, kept_there) = first, second
        if dataset != same or one is other:
            continue
        places = [(part["context"], kept) for part, kept in ((one, here), (other, kept_there))]
        if places[0] != places[1]:
            (length, count), (other_length, other_count) = places
            raise ValueError(
                f"{where} holds out {count} x {length} tokens of {dataset} and {there} "
                f"{other_count} x {other_length}: one may be fitted to what the other holds out; "
                "make both with the same calibration.held_out and seqlen"
            )
        if one["seed"] == other["seed"]:
            raise ValueError(
                f"{where} and {there} have the same windows of {dataset}: both are of "
                f"calibration.seed={one['seed']}; make one with another seed"
            )


def _tell(path: Path, record: dict[str, Any]) -> None:
    tokens = sum(t["windows"] * p["context"] for p in record["parts"] for t in p["texts"])
    size = math.ceil(path.stat().st_size / 2**20)
    print(
        f"{path}: {record['model']}, {record['blocks']} blocks, {tokens} tokens "
        f"({statistics_text(record)}), {size} MiB"
    )
