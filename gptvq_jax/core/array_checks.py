"""Pieces of a check of arrays and sizes that anyone may have written."""

from typing import Any

import numpy as np

from gptvq_jax.console.errors import brief

MAX_SIZE = 2**31 - 1  # of an axis, and of what is counted in int32


def signature(array: Any) -> str:
    """dtype and shape, as in uint8[1,576,216]."""
    return f"{np.dtype(array.dtype).name}{brackets(array.shape)}"


def axis(name: str, array: Any, ndim: int, axis: int) -> int:
    shape = getattr(array, "shape", None)
    if shape is None:
        raise ValueError(f"{name} is missing")
    if len(shape) != ndim or not 1 <= shape[axis] <= MAX_SIZE:
        raise ValueError(f"{name} must have {ndim} axes and none that is empty, not {list(shape)}")
    return shape[axis]


def check_size(name: str, value: Any, largest: int) -> None:
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name}={brief(value)} must be an integer of 1 to {largest}")


def check_equal(name: str, value: Any, expected: int) -> None:
    if type(value) is not int or value != expected:
        raise ValueError(f"{name}={brief(value)} must be {expected}")


def brackets(shape: Any) -> str:
    return f"[{','.join(map(str, shape))}]"
