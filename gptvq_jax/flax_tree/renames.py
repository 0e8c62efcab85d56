"""Steps of a program that only rename the axes of a weight, or its dtype: it stays a weight."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gptvq_jax.flax_tree.products import Weight
from gptvq_jax.flax_tree.view import View


def renamed(name: str, params: Mapping[str, Any], weight: Weight) -> Weight | None:
    """The weight after a step; None where the step does more than that.

    Args:
      name, params: of the step's primitive.
      weight: its first input.
    """
    return _RENAMES[name](weight, params) if name in _RENAMES else None


def _seen(weight: Weight, view: View | None) -> Weight | None:
    return None if view is None else dataclasses.replace(weight, view=view)


def _reshape(weight, params):
    return _seen(weight, weight.view.reshaped(params["new_sizes"]))


def _squeeze(weight, params):
    shape = [n for axis, n in enumerate(weight.view.shape) if axis not in params["dimensions"]]
    return _seen(weight, weight.view.reshaped(shape))


def _transpose(weight, params):
    return _seen(weight, weight.view.transposed(params["permutation"]))


def _broadcast(weight, params):
    return _seen(weight, weight.view.broadcast(params["shape"], params["broadcast_dimensions"]))


def _convert(weight, params):
    dtype = params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return dataclasses.replace(weight, dtype=dtype)


_RENAMES = {
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "sharding_constraint"), lambda w, _: w),
}
