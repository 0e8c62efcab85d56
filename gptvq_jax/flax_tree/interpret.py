"""Runs a function of arrays with something else in the place of some weights.

The function is traced, and its program gone through step by step. A weight is followed through
what only renames its axes, and into functions, loops and branches (control_flow.py), until a
product reads it: a Reader says what that gives. So it does not matter which module made the
product.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal

from gptvq_jax.flax_tree.kernel import is_packed
from gptvq_jax.flax_tree.products import Product, Weight, of_convolution, of_dot_general
from gptvq_jax.flax_tree.view import View, whole


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
    values = [weights.get(i, leaves[i]) for i in places]
    results = _run(program, values, reader)
    return jax.tree.unflatten(jax.tree.structure(shapes), _all_dense(results, reader, "the output"))


def weight_of(name: str, leaf: Any) -> Weight:
    """The weight that a leaf with the shape and dtype of a kernel is."""
    return Weight(name, tuple(leaf.shape), whole(leaf.shape), leaf.dtype)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Weight)


def _run(program: ClosedJaxpr, values: Sequence[Any], reader: Reader) -> list[Any]:
    """Results of a program of which inputs may be weights; results may be weights, too."""
    known = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    known.update(zip(program.jaxpr.invars, values, strict=True))

    def read(name):
        return name.val if isinstance(name, Literal) else known[name]

    for step in program.jaxpr.eqns:
        inputs = [read(name) for name in step.invars]
        act = _with_weights if any(map(_is_weight, inputs)) else _as_it_is
        known.update(zip(step.outvars, act(step, inputs, reader), strict=True))
    return [read(name) for name in program.jaxpr.outvars]


def _as_it_is(step, inputs: Sequence[Any], reader: Reader) -> list[Any]:
    functions, params = step.primitive.get_bind_params(step.params)
    result = step.primitive.bind(
        *functions, *_all_dense(inputs, reader, str(step.primitive)), **params
    )
    return list(result) if step.primitive.multiple_results else [result]


def _with_weights(step, inputs: Sequence[Any], reader: Reader) -> list[Any]:
    name, params = step.primitive.name, step.params
    if name in _RENAMES and (seen := _RENAMES[name](inputs[0], params)) is not None:
        return [seen]
    if name in _CALLS:
        return _run(_called(params), inputs, reader)
    if name in _CONTROL:
        return _CONTROL[name](params, inputs, reader)
    product = _product(step, inputs)
    if product is None or product.layout is None:
        return _as_it_is(step, inputs, reader)

    def dense():
        filled = [_values(v, reader) if _is_weight(v) else v for v in inputs]
        return _as_it_is(step, filled, reader)[0]

    return [reader.product(product, dense)]


def _product(step, inputs: Sequence[Any]) -> Product | None:
    """A product with one weight; None for anything else."""
    name, dtype = step.primitive.name, step.outvars[0].aval.dtype
    if sum(map(_is_weight, inputs)) != 1:
        return None
    if name == "dot_general":
        return of_dot_general(*inputs, step.params, dtype)
    if name == "conv_general_dilated" and _is_weight(inputs[1]):
        return of_convolution(*inputs, step.params, dtype)
    return None


def _all_dense(values: Sequence[Any], reader: Reader, what: str) -> list[Any]:
    """Arrays; `what` reads the weights among them."""
    for value in values:
        if _is_weight(value):
            reader.other(value, what)
    return [_values(value, reader) if _is_weight(value) else value for value in values]


def _values(weight: Weight, reader: Reader) -> jax.Array:
    return weight.view.read(reader.kernel(weight.name)).astype(weight.dtype)


# --- what only renames axes: (weight, parameters of the step) -> weight, or None ---


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

# --- functions, loops and branches: (parameters of the step, inputs, reader) -> results ---

_CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
)


def _called(params: Mapping[str, Any]) -> ClosedJaxpr:
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    program = next(params[name] for name in names if name in params)
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


def _scan(params, inputs, reader) -> list[Any]:
    """Weights that every turn reads stay in the loop; stacked ones are read turn by turn."""
    body, count = params["jaxpr"], params["num_carry"]
    shared, rest = inputs[: params["num_consts"]], inputs[params["num_consts"] :]
    carry, rows = _all_dense(rest[:count], reader, "the carry of a scan"), rest[count:]
    options = {"length": params["length"], "reverse": params["reverse"]}

    def turn(carry, row):
        out = _all_dense(_run(body, [*shared, *carry, *row], reader), reader, "a scan")
        return out[:count], out[count:]

    if any(map(_is_weight, rows)):
        return _unrolled(turn, carry, rows, **options)

    def step(state, row):
        reader.state, carry = state
        carry, out = turn(carry, row)
        return (reader.state, carry), out

    (reader.state, carry), out = lax.scan(step, (reader.state, carry), rows, **options)
    return [*carry, *out]


def _unrolled(turn, carry, rows, length, reverse) -> list[Any]:
    turns, out = range(length), [None] * length
    for i in reversed(turns) if reverse else turns:
        row = [_seen(v, v.view.at(i)) if _is_weight(v) else v[i] for v in rows]
        carry, out[i] = turn(carry, row)
    return [*carry, *(jnp.stack(values) for values in zip(*out, strict=True))]


def _cond(params, inputs, reader) -> list[Any]:
    index, operands = inputs[0], inputs[1:]

    def branch(program):
        def run(state, arrays):
            reader.state, arrays = state, iter(arrays)
            values = [v if _is_weight(v) else next(arrays) for v in operands]
            out = _all_dense(_run(program, values, reader), reader, "a branch")
            return reader.state, out

        return run

    arrays = [v for v in operands if not _is_weight(v)]
    branches = [branch(program) for program in params["branches"]]
    reader.state, out = lax.switch(index, branches, reader.state, arrays)
    return out


def _while(params, inputs, reader) -> list[Any]:
    first, count = params["cond_nconsts"], params["body_nconsts"]
    of_test, of_body = inputs[:first], inputs[first : first + count]
    start = _all_dense(inputs[first + count :], reader, "the carry of a loop")

    def test(state):
        reader.state, values = state
        return _run(params["cond_jaxpr"], [*of_test, *values], reader)[0]

    def body(state):
        reader.state, values = state
        out = _run(params["body_jaxpr"], [*of_body, *values], reader)
        return reader.state, _all_dense(out, reader, "a loop")

    reader.state, out = lax.while_loop(test, body, (reader.state, start))
    return out


_CONTROL = {"scan": _scan, "cond": _cond, "while": _while}
