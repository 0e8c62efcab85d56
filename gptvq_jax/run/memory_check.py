"""A run whose arrays cannot be in memory is refused before it begins."""

import os

import jax

from gptvq_jax.config import RunSettings
from gptvq_jax.files.disk_space import size_text
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.run.memory import CERTAIN, DEVICE, HOST, Item, memory_items, peaks

# What makes an item smaller, beside a smaller model.
LOWERED_BY = {
    "activations": "calibration.batch_size or calibration.seqlen",
    "logits": "evaluation.batch_size",
    "sums of x x^T": "calibration.gradient_groups, or set calibration.held_out=0",
    "sums of float x times x^T": "calibration.asymmetry to 0",
    "what a batch keeps for its way back": "calibration.batch_size or tune.batch_size",
    "token weights": "calibration.num_windows",
}


def check_memory(config: ModelConfig, settings: RunSettings) -> None:
    """Checks that what is certainly in memory at once fits.

    Temporaries, and what the compiler may avoid, are not counted, nor Python and JAX themselves.

    Raises:
      ValueError: it does not; names the phase, its largest items and settings that lower them.
    """
    items = [item for item in memory_items(config, settings) if item.name in CERTAIN]
    shared = jax.default_backend() == "cpu"
    for where, (size, phase) in peaks(items, shared).items():
        room = _room(where, shared)
        if room is not None and size > room:
            raise ValueError(_message(items, where, phase, size, room, shared))


def _message(items: list[Item], where: str, phase: str, size: int, room: int, shared: bool) -> str:
    here = [i for i in items if i.phase == phase and (shared or i.where == where)]
    here = list({i.name: i for i in sorted(here, key=lambda i: i.num_bytes)}.values())[::-1]
    parts = ", ".join(f"{item.name} {size_text(item.num_bytes)}" for item in here[:3])
    fields = [LOWERED_BY[item.name] for item in here if item.name in LOWERED_BY]
    how = f"lower {fields[0]}" if fields else "take a machine with more"
    return (
        f"memory of the {where}: '{phase}' needs {size_text(size)} at least ({parts}), and "
        f"{size_text(room)} are there; {how}; scripts/plan.py lists all of it"
    )


def _room(where: str, shared: bool) -> int | None:
    """Bytes of memory that this machine can give; None: it does not say."""
    if where == DEVICE and not shared:
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("bytes_limit")
    assert where == HOST
    return host_memory()


def host_memory() -> int | None:
    """Bytes that processes can get without anybody being killed; None: the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
