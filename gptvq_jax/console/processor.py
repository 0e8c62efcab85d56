"""What the numbers of a machine are printed beside: its processor, and what it computes on."""

import os
import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """Such as "2 cores of AMD EPYC 7R13 Processor", and the accelerator where there is one."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = f"{cores} core{'s'[: cores != 1]} of {_model()}"
    device = jax.devices()[0]
    return name if device.platform == "cpu" else f"{device.device_kind}, {name}"


def _model() -> str:
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    # ARM's kernels name no model.
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown"
