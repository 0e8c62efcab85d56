"""What a sweep will take, from shapes: FLOP, and bytes on the disk.

FLOP are those of matrix products and of the search of trellis codes, which is most of their work.

Seconds follow from a rate: of this machine's matrix products, as a lower bound, or, once cells are
finished, of those cells as they were.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptvq_jax.config import RunSettings
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.run import work
from gptvq_jax.run.disk import most_stored_bytes
from gptvq_jax.run.formats import num_quantized
from gptvq_jax.run.passes import peak_bytes
from gptvq_jax.study.sweep.passes import FLOAT, GRADIENTS, Pass

# Stages of a run over the quantized model; those of the float one are passes that cells share.
_OWN = ("hessians", "advance", "quantize", "tune", "embed", "tune model")


def cell_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of a run that finds its passes over the float model made; a held-out text of unknown length
    is left out, and rounds that may stop early count in full."""
    stages = work.run_flop(config, settings)
    own = sum(stages.get(stage, 0.0) for stage in _OWN)
    own += work.search_flop(config, settings)
    return own + work.evaluation_flop(config, settings)


def pass_flop(config: ModelConfig, of: Pass) -> float:
    """Of a pass that cells share."""
    settings = of.settings
    shape = settings.calibration.all_windows, settings.calibration.seqlen
    if of.kind == FLOAT:
        points = config.block_counts(of.points).items()
        size = sum(count * flops.block_forward(block, *shape) for block, count in points)
        return size + work.evaluation_flop(config, settings)
    if of.kind == GRADIENTS:
        return work.gradients_flop(config, settings) + work.allocation_flop(config, settings)
    tokens = shape[0] * shape[1]
    return sum(
        count
        * (
            flops.block_inputs(block, *shape)
            + work.moments_flop(block, settings, tokens, range(work.LAST))
        )
        for block, count in config.block_counts(num_quantized(settings, config)).items()
    )


def cell_bytes(config: ModelConfig, settings: RunSettings) -> tuple[int, int]:
    """Of a run: what stays on the disk, and what it takes for a while beside it."""
    shape = settings.calibration.all_windows, settings.calibration.seqlen
    while_it_runs = peak_bytes(config, settings, shape, 0, made=True)
    return most_stored_bytes(config, settings), while_it_runs


class Seconds(NamedTuple):
    """Of what is left of a sweep."""

    value: float
    basis: str  # where that comes from
    at_least: bool = False  # whether it is a bound from below


def seconds(
    flop: Mapping[str, float],
    left: Sequence[str],
    passes: float,
    rows: Mapping[str, Mapping[str, Any]],
    rate: Callable[[], float],
) -> Seconds:
    """How long the cells that are left will take.

    Args:
      flop: of every cell.
      left: names of cells.
      passes: FLOP of the passes that are left.
      rows: of finished cells, by name.
      rate: measures the FLOP/s of this machine's matrix products; called only where no cell is
        finished.
    """
    wanted = math.fsum(flop[name] for name in left) + passes
    if not wanted:
        return Seconds(0.0, "nothing is left")
    known = {name: float(row["seconds"]) for name, row in rows.items() if flop.get(name)}
    if known and sum(known.values()) > 0:
        per_flop = sum(known.values()) / sum(flop[name] for name in known)
        return Seconds(wanted * per_flop, f"as {len(known)} finished cells took")
    best = rate()
    basis = f"its arithmetic alone, at {best / 1e12:.2f} TFLOP/s, which this machine reaches"
    return Seconds(wanted / best, basis, at_least=True)
