"""Runs a function of arrays with something else in the place of some weights.

The function is traced, and its program gone through step by step. A weight is followed through
what only renames its axes, and into functions, loops and branches (control_flow.py), until a
product reads it: a Reader says what that gives. So it does not matter which module made the
product.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from gptvq_jax.flax_tree.control_flow import CONTROL_FLOW
from gptvq_jax.flax_tree.kernel import is_packed
from gptvq_jax.flax_tree.products import (
    Product,
    Weight,
    is_weight,
    of_convolution,
    of_dot_general,
)
from gptvq_jax.flax_tree.renames import renamed
from gptvq_jax.flax_tree.view import whole


class Reader:
    """What reads weights.

    Attributes:
      state: a pytree that `product` may replace by one of the same structure and shapes.
    """

    state: Any = ()

    def kernel(self, name: str) -> jax.Array:
        """The dense kernel."""
        raise NotImplementedError

    def product(self, product: Product, dense: Callable[[], jax.Array]) -> jax.Array:
        """What a product with a weight gives; `dense()` multiplies by the dense kernel."""
        raise NotImplementedError

    def other(self, weight: Weight, what: str) -> None:
        """Is told of a weight that `what` reads in place of a product."""


def interpret(function: Callable, args: Any, weights: Mapping[int, Weight], reader: Reader) -> Any:
    """function(*args), with weights read by `reader`.

    Args:
      function: such that jax.jit could take it.
      args: a tuple of trees of arrays and static values.
      weights: {number of a leaf of args: weight}; a PackedKernel is one leaf.
      reader: of the weights.

    Returns:
      What the function does, arrays throughout.
    """
    leaves, structure = jax.tree.flatten(args, is_leaf=is_packed)
    places = [i for i, leaf in enumerate(leaves) if i in weights or _is_array(leaf)]

    def flat(*arrays):
        filled = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        return function(*jax.tree.unflatten(structure, filled))

    abstract = [
        jax.ShapeDtypeStruct(weights[i].shape, weights[i].dtype) if i in weights else leaves[i]
        for i in places
    ]
    program, shapes = jax.make_jaxpr(flat, return_shape=True)(*abstract)
    values = [weights[i] if i in weights else jnp.asarray(leaves[i]) for i in places]
    results = _run(program, values, reader)
    return jax.tree.unflatten(jax.tree.structure(shapes), _all_dense(reader, results, "the output"))


def weight_of(name: str, leaf: Any) -> Weight:
    """The weight that a leaf with the shape and dtype of a kernel is."""
    return Weight(name, tuple(leaf.shape), whole(leaf.shape), leaf.dtype)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _run(program: ClosedJaxpr, values: Sequence[Any], reader: Reader) -> list[Any]:
    """Results of a program of which inputs may be weights; results may be weights, too."""
    known = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    known.update(zip(program.jaxpr.invars, values, strict=True))

    def read(name):
        return name.val if isinstance(name, Literal) else known[name]

    for step in program.jaxpr.eqns:
        inputs = [read(name) for name in step.invars]
        act = _with_weights if any(map(is_weight, inputs)) else _as_it_is
        known.update(zip(step.outvars, act(step, inputs, reader), strict=True))
    return [read(name) for name in program.jaxpr.outvars]


def _as_it_is(step, inputs: Sequence[Any], reader: Reader) -> list[Any]:
    arrays = _all_dense(reader, inputs, step.primitive.name)
    params = step.primitive.get_bind_params(step.params)
    # Before JAX 0.10 functions that the step calls were apart.
    functions, params = params if isinstance(params, tuple) else ((), params)
    with step.ctx.manager:
        result = step.primitive.bind(*functions, *arrays, **params)
    return list(result) if step.primitive.multiple_results else [result]


def _with_weights(step, inputs: Sequence[Any], reader: Reader) -> list[Any]:
    name, params = step.primitive.name, step.params
    if is_weight(inputs[0]) and (seen := renamed(name, params, inputs[0])) is not None:
        return [seen]
    if name in _CALLS:
        return _run(_called(params), inputs, reader)
    if name in CONTROL_FLOW:
        run = partial(_run, reader=reader)
        dense = partial(_all_dense, reader)
        return CONTROL_FLOW[name](params, inputs, reader, run, dense)
    product = _product(step, inputs)
    if product is None or product.layout is None:
        return _as_it_is(step, inputs, reader)

    def multiplied():
        filled = [_values(v, reader) if is_weight(v) else v for v in inputs]
        return _as_it_is(step, filled, reader)[0]

    return [reader.product(product, multiplied)]


def _product(step, inputs: Sequence[Any]) -> Product | None:
    """A product with one weight; None for anything else."""
    name, dtype = step.primitive.name, step.outvars[0].aval.dtype
    if sum(map(is_weight, inputs)) != 1:
        return None
    if name == "dot_general":
        return of_dot_general(*inputs, step.params, dtype)
    if name == "conv_general_dilated" and is_weight(inputs[1]):
        return of_convolution(*inputs, step.params, dtype)
    return None


def _all_dense(reader: Reader, values: Sequence[Any], what: str) -> list[Any]:
    """Arrays; `what` reads the weights among them."""
    for value in values:
        if is_weight(value):
            reader.other(value, what)
    return [_values(value, reader) if is_weight(value) else value for value in values]


def _values(weight: Weight, reader: Reader) -> jax.Array:
    return weight.view.read(reader.kernel(weight.name)).astype(weight.dtype)


_CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
)


def _called(params: Mapping[str, Any]) -> ClosedJaxpr:
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    program = next(params[name] for name in names if name in params)
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())
