"""Flax models as functions of their variables, and the names of what is in a tree of those."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from gptvq_jax.flax_tree.kernel import is_packed

_BOXES = ("value", "raw_value")  # of nnx.Variable, nn.Partitioned: not a part of a name


def as_function(model: Any) -> Callable[..., Any]:
    """The model as a function of (variables, *inputs).

    Args:
      model: a Linen module, run by `apply`; an NNX module, run by its `__call__` with a state in
        the place of its own; or such a function.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(model, nn.Module):
        return model.apply
    if isinstance(model, nnx.Module):
        graph = nnx.graphdef(model)
        return lambda state, *inputs, **options: nnx.merge(graph, state)(*inputs, **options)
    if callable(model):
        return model
    raise ValueError(
        "model must be a Flax module, or a function of (variables, *inputs), not "
        f"{type(model).__name__}"
    )


def variables_of(model: Any, params: Any) -> Any:
    """The tree that `as_function(model)` takes first.

    Raises:
      ValueError: it was not given, or twice.
    """
    if isinstance(model, nnx.Module):
        if params is not None:
            raise ValueError("params: an NNX module has its own; leave them out")
        return nnx.state(model)
    if params is None:
        raise ValueError("params is missing: what the model takes first, such as model.init(...)")
    if isinstance(model, nn.Module) and "params" not in params:
        raise ValueError(
            "params must be what apply takes first, {'params': ...}, with all collections"
        )
    return params


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(name, leaf) in the order of leaves; a name is the keys on the way, joined by '/'."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    return [("/".join(_parts(path)), leaf) for path, leaf in leaves]


def layer_name(name: str) -> str:
    """Of a parameter: 'block_0/mlp' for Linen's 'params/block_0/mlp/kernel'."""
    return name.removeprefix("params/").removesuffix("/kernel")


def _parts(path: Any) -> list[str]:
    parts = []
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey) and key.name in _BOXES:
            continue
        found = (getattr(key, field, None) for field in ("key", "idx", "name"))
        parts.append(str(next(value for value in found if value is not None)))
    return parts
