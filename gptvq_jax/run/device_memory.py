"""Out of memory on a device: the stage that it happens in says which setting lowers the need.

What is certainly too much is refused before a run begins (memory_check.py). Temporaries of programs
are known by the compiler alone.
"""

import contextlib
from collections.abc import Iterator

import jax

from gptvq_jax.console.errors import first_line
from gptvq_jax.console.stopwatch import Stopwatch

EVALUATE = "evaluate"
_BATCH = "calibration.batch_size, or calibration.seqlen"

# By stage of the stopwatch: what makes the largest program smaller that runs in it.
LOWERED_BY = {
    "forward": _BATCH,
    "gradients": _BATCH,
    "hessians": f"{_BATCH}; calibration.held_out=0 keeps half as many sums",
    "advance": _BATCH,
    "allocation": "allocation.measured, and keep allocation.sample=True",
    "quantize": (
        "vq.beam or aqlm.beam where it is above 1; calibration.held_out=0 keeps half as many sums; "
        "more devices have fewer rows each"
    ),
    "tune": "tune.batch_size, or calibration.seqlen",
    "tune model": "finetune.micro_batch, or calibration.seqlen",
    EVALUATE: "evaluation.batch_size, or evaluation.seqlen",
}


class DeviceMemoryError(ValueError):
    """Names the stage of a run in which a device had no memory left, and what lowers its need."""


@contextlib.contextmanager
def explained(stopwatch: Stopwatch | None = None, stage: str = "") -> Iterator[None]:
    """Puts a DeviceMemoryError in place of XLA's RESOURCE_EXHAUSTED.

    Args:
      stopwatch: which knows the stage that the error has left.
      stage: where there is none.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        stage = (stopwatch.failed if stopwatch else None) or stage
        fields = LOWERED_BY.get(stage)
        how = f"lower {fields}" if fields else "take a device with more memory"
        where = f" in stage '{stage}'" if stage else ""
        raise DeviceMemoryError(
            f"a device is out of memory{where} ({first_line(error)}); {how}; scripts/plan.py lists "
            "what each stage holds"
        ) from error
