"""What the config file of a sweep is made of: a base config, and axes of points.

    sweep(
        "widths",
        base="smollm2_135m_2d:2b",
        axes=[axis("vq.dim", (1, 2)), axis("vq.bits", (2.0, 3.0), name="bits")],
    )

has four cells: every point of one axis with every point of the other.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from gptvq_jax.config import checked_field, flat
from gptvq_jax.console.config_file import load_config
from gptvq_jax.recipe import parse

KINDS = ("models", "layers")  # a cell is a run over a model, or a setting on some of its layers
_LONGEST = 60  # text of a recipe in a name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


@dataclasses.dataclass(frozen=True)
class Point:
    """Of an axis: a name, and the fields it sets in place of those of the base."""

    name: str
    fields: Mapping[str, Any]  # {"vq.dim": 2, ...}
    config: str = ""  # the config, with its argument, whose fields these are


@dataclasses.dataclass(frozen=True)
class Own:
    """What single cells set besides their points: {names of points: {field: value}}.

    Of a cell that is left out, why."""

    fields: Mapping[tuple[str, ...], Mapping[str, Any] | str]


@dataclasses.dataclass(frozen=True)
class Axis:
    """Of a sweep."""

    name: str
    points: tuple[Point, ...]


def axis(
    field: str, values: Sequence[Any], name: str = "", names: Sequence[str] | None = None
) -> Axis:
    """Values of one field.

    Args:
      field: such as "vq.dim".
      values: of that field.
      name: of the axis; default: the last part of the field.
      names: of its points; default: name and value, as in "dim2" or, of recipes, in
        "recipe-down_proj-bits4"; of recipes with long or equal names, name and number.
    """
    name = name or field.rpartition(".")[2]
    if names is None:
        texts = _recipe_texts(values) if field == "recipe" else map(_text, values)
        names = [f"{name}{text}" for text in texts]
    if len(names) != len(values):
        raise ValueError(f"axis {name!r} has {len(values)} values and {len(names)} names")
    return points(name, {n: {field: v} for n, v in zip(names, values, strict=True)}, names)


def points(
    name: str, fields: Mapping[str, Mapping[str, Any]], names: Sequence[str] | None = None
) -> Axis:
    """Points that set several fields each: {name of the point: {field: value}}.

    Raises:
      ValueError: a field that does not exist, a value of another type, or a name that is no name of
        a directory.
    """
    found = []
    for point in names or fields:
        _check_name(point, f"a point of axis {name!r}")
        try:
            values = {field: checked_field(field, v) for field, v in fields[point].items()}
        except ValueError as error:
            raise ValueError(f"axis {name!r}, point {point!r}: {error}") from None
        found.append(Point(point, values))
    return _axis(name, found)


def configs(name: str, of_points: Mapping[str, str]) -> Axis:
    """Points that are configs: {name of the point: config with its argument, "llama2_7b_2d:3b"}.

    A point sets the fields in which its config differs from the base of the sweep.
    """
    for point in of_points:
        _check_name(point, f"a point of axis {name!r}")
    return _axis(name, [Point(point, {}, config) for point, config in of_points.items()])


def sweep(
    name: str,
    base: str | config_dict.ConfigDict,
    axes: Sequence[Axis],
    fields: Mapping[str, Any] | None = None,
    kind: str = "models",
    cells: Mapping[tuple[str, ...], Mapping[str, Any] | str] | None = None,
) -> config_dict.ConfigDict:
    """What `get_config` of a sweep's config file returns.

    Args:
      name: of the sweep.
      base: name of a config with its argument, or a config; what all cells start from.
      axes: in the order in which names of cells have them.
      fields: that differ from those of the base in all cells.
      kind: of KINDS.
      cells: what single cells set besides, {(point of the first axis, of the second, ...): fields};
        or, in place of fields, why there is no such cell.

    Returns:
      name, kind, base (a run's config), source (its name, or ""), axes, cells.

    Raises:
      ValueError: as `points`; no such base; or two axes or points have one name.
    """
    _check_name(name, "the sweep")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} of sweep {name!r} must be one of {', '.join(KINDS)}")
    if not axes:
        raise ValueError(f"sweep {name!r} has no axes; give it one with axis(FIELD, VALUES)")
    _check_unique([of.name for of in axes], f"axes of sweep {name!r}")
    source = base if isinstance(base, str) else ""
    config = (load_config(source) if source else base).copy_and_resolve_references()
    config.update_from_flattened_dict({f: checked_field(f, v) for f, v in (fields or {}).items()})
    before = flat(config.to_dict())
    return config_dict.ConfigDict({
        "name": name,
        "kind": kind,
        "base": config,
        "source": source,
        "axes": tuple(_against(before, of) for of in axes),
        "cells": Own(_cells(axes, cells or {})),
    })  # fmt: skip


def _cells(
    axes: Sequence[Axis], cells: Mapping[tuple[str, ...], Mapping[str, Any] | str]
) -> dict[tuple[str, ...], dict[str, Any] | str]:
    """The fields of single cells, checked."""
    known = set(itertools.product(*([point.name for point in of.points] for of in axes)))
    found = {}
    for names, fields in cells.items():
        if names not in known:
            raise ValueError(f"there is no cell {names!r}; name a point of every axis, in order")
        if isinstance(fields, str):
            found[names] = fields
            continue
        try:
            found[names] = {field: checked_field(field, v) for field, v in fields.items()}
        except ValueError as error:
            raise ValueError(f"cell {names!r}: {error}") from None
    return found


def _against(base: Mapping[str, Any], of: Axis) -> Axis:
    """The axis with the fields of its configs filled in."""

    def filled(point: Point) -> Point:
        if not point.config:
            return point
        own = flat(load_config(point.config).to_dict())
        changed = {field: value for field, value in own.items() if base.get(field) != value}
        return dataclasses.replace(point, fields=changed)

    return Axis(of.name, tuple(filled(point) for point in of.points))


def _axis(name: str, found: Sequence[Point]) -> Axis:
    _check_name(name, "an axis")
    if not found:
        raise ValueError(f"axis {name!r} has no points; give it values")
    _check_unique([point.name for point in found], f"points of axis {name!r}")
    return Axis(name, tuple(found))


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name {name!r} of {what} must be of letters, digits and . _ = + - and start with "
            "a letter or digit: directories are named so; choose another"
        )


def _check_unique(names: Sequence[str], what: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two {what} are called {twice!r}; rename one of them")


def _recipe_texts(values: Sequence[Any]) -> list[str]:
    texts = [_recipe_text(value) for value in values]
    if max(map(len, texts), default=0) > _LONGEST or len({*texts}) < len(texts):
        return [str(number) for number in range(1, len(texts) + 1)]
    return texts


def _recipe_text(value: Any) -> str:
    """Its rules, with the letters and digits of their patterns."""
    texts = []
    for rule in parse(value):
        layers = re.sub(r"[^A-Za-z0-9_]+", "-", rule.pattern).strip("-") or "all"
        sets = (_text(v) if name == "method" else name + _text(v) for name, v in rule.overrides)
        texts.append("-".join([layers, *sets]))
    return "-" + ("+".join(texts) or "none")


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "+".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub(r"[^A-Za-z0-9._=+-]", "_", str(value))
