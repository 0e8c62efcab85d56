"""Which settings tell cells apart, and which cells belong on one curve."""

import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from gptvq_jax.config import default_config, flat
from gptvq_jax.study.report.results import Cell
from gptvq_jax.study.report.rows import printable

# What the bits of a weight come from, which a curve goes along; and what `code_name` says.
_BITS = (
    "vq.dim",
    "vq.bits",
    "vq.group_size",
    "vq.max_group_cols",
    "trellis.bits",
    "trellis.window_bits",
    "method",
)
_SECTIONS = ("aqlm.num_codebooks", "aqlm.code_bits", "aqlm.dim", "uniform.", "allocation.")
_NOT_SETTINGS = ("weights",)  # config.json has the fingerprint of the source there


def settings_of(cell: Cell) -> dict[str, str]:
    """{dotted field: value as text}."""
    return {
        name: _text(value)
        for name, value in cell.settings.items()
        if name.partition(".")[0] not in _NOT_SETTINGS
    }


def differing(cells: Sequence[Cell]) -> list[str]:
    """Fields whose values differ between cells that have them, in the order of the config."""
    return [name for name, values in _values(cells).items() if len(values) > 1]


def common(cells: Sequence[Cell]) -> dict[str, str]:
    """Settings that all cells share and that are not the defaults."""
    defaults = {name: _text(value) for name, value in flat(default_config().to_dict()).items()}
    found = _values(cells).items()
    shared = {name: next(iter(values)) for name, values in found if len(values) == 1}
    return {name: value for name, value in shared.items() if value != defaults.get(name)}


def _values(cells: Sequence[Cell]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for cell in cells:
        for name, value in settings_of(cell).items():
            found.setdefault(name, set()).add(value)
    return found


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value))


def code_name(cell: Cell) -> str:
    """Method and dimension, such as "GPTVQ 2D" or "TRELLIS L=12"; "mixed" where layers differ."""
    method = str(cell.settings.get("method", "gptvq")).upper()
    if method in ("GPTQ", "RTN"):
        return method
    if method == "TRELLIS":
        bits = cell.settings.get("trellis.window_bits")
        return printable(method if bits is None else f"{method} L={bits}")
    dims = {row["dim"] for row in cell.layers if "dim" in row}
    if not dims:
        dims = {cell.settings.get("aqlm.dim" if method == "AQLM" else "vq.dim")} - {None}
    name = f"{next(iter(dims))}D" if len(dims) == 1 else "mixed" if dims else ""
    return printable(f"{method} {name}".strip())


def curve_names(cells: Sequence[Cell]) -> dict[str, str]:
    """{cell: its curve}: method, dimension, and what else differs but the bits of a weight."""
    fields = [
        name for name in differing(cells) if name not in _BITS and not name.startswith(_SECTIONS)
    ]
    names = {}
    for cell in cells:
        settings = settings_of(cell)
        parts = [code_name(cell), *(f"{n}={settings[n]}" for n in fields if n in settings)]
        if cell.settings.get("allocation.bits_per_value"):
            parts.insert(1, "bits by layer")
        names[cell.name] = ", ".join(parts)
    return names


def alike(cells: Sequence[Cell], key: Callable[[Cell], Hashable]) -> list[list[Cell]]:
    """Cells that may be compared: those with one key, groups in the order of their first."""
    groups: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return list(groups.values())
