"""Which settings tell cells apart, and which cells belong on one curve."""

import json
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from gptvq_jax.config import default_config, flat
from gptvq_jax.console.errors import printable
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.recipe import parse
from gptvq_jax.study.report.results import Cell

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
    """{dotted field: value as text}, without the sections that its method does not take."""
    method = METHODS.get(str(cell.settings.get("method")))
    left_out = {*_NOT_SETTINGS}
    if method is not None:
        used = {method.section, *_sections_of_rules(cell.settings.get("recipe"))}
        left_out |= {other.section for other in METHODS.values()} - used
    return {
        name: _text(value)
        for name, value in cell.settings.items()
        if name.partition(".")[0] not in left_out
    }


def _sections_of_rules(recipe: Any) -> set[str]:
    """Sections of the config that rules of a recipe take."""
    try:
        rules = parse(recipe or ())
    except ValueError:  # of a file that anyone may have written
        return set()
    named = [str(dict(rule.overrides).get("method")) for rule in rules]
    return {METHODS[name].section for name in named if name in METHODS}


def differing(cells: Sequence[Cell]) -> list[str]:
    """Fields whose values differ between cells that have them, in the order of the config."""
    return [name for name, values in _values(cells).items() if len(values) > 1]


def columns(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """Axes and fields that say something of their own; those that say less give way."""
    axes = list(dict.fromkeys(name for cell in cells for name in cell.point))
    fields = differing(cells)
    for axis in tuple(axes):
        of_axis = [(c.point[axis], settings_of(c)) for c in cells if axis in c.point]
        for field in tuple(fields):
            both = [(point, of[field]) for point, of in of_axis if field in of]
            if not both or not all(_same(point, value) for point, value in both):
                continue
            if len(both) == len(of_axis):
                axes.remove(axis)
                break
            if all(axis in cell.point for cell in cells):
                fields.remove(field)
    return axes, fields


def _same(point: str, value: str) -> bool:
    """Whether a point is named after a value, as dim2 and 2d are after 2."""
    number = re.fullmatch(r"[A-Za-z_]*=?(-?\d+(?:\.\d+)?(?:e-?\d+)?)[A-Za-z]*", point)
    try:
        return point == value or (number is not None and float(number[1]) == float(value))
    except ValueError:
        return False


def common(cells: Sequence[Cell]) -> dict[str, str]:
    """Settings that all cells with such a field share and that are not the defaults."""
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
