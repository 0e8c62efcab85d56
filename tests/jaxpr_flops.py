"""FLOP of matrix products in a traced program, counted equation by equation.

The second way to count what core/flops.py and models/flops.py have formulas of.
"""

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def count(function, *args, trips: int | None = None, **static) -> float:
    """FLOP of function(*args, **static), what its results do not depend on left out.

    Args:
      function: traced, never run.
      args: pytrees of arrays or of jax.ShapeDtypeStruct.
      trips: of every while loop, which a program does not say.
      static: what is no array.
    """
    closed = jax.make_jaxpr(lambda *a: function(*a, **static))(*args)
    needed = [True] * len(closed.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, needed)
    return of_jaxpr(jaxpr, trips)


def of_jaxpr(jaxpr: Jaxpr | ClosedJaxpr, trips: int | None = None) -> float:
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of_equation(equation, trips) for equation in jaxpr.eqns)


def _of_equation(equation, trips):
    name, params = equation.primitive.name, equation.params
    shapes = [v.aval.shape for v in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(shapes[0][i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = params["dimension_numbers"].rhs_spec  # outputs, inputs of a group, space
        window = math.prod(shapes[1][i] for i in kernel[1:])
        return 2 * equation.outvars[0].aval.size * window
    if name == "cholesky":
        return math.prod(shapes[0][:-2]) * shapes[0][-1] ** 3 / 3
    if name == "lu":
        *lead, m, n = shapes[0]
        k = min(m, n)
        return math.prod(lead) * (2 * m * n * k - (m + n) * k**2 + 2 * k**3 / 3)
    if name == "triangular_solve":
        return shapes[0][-1] * math.prod(shapes[1])
    if name == "scan":
        return params["length"] * of_jaxpr(params["jaxpr"], trips)
    if name == "cond":
        return max(of_jaxpr(branch, trips) for branch in params["branches"])
    if name == "custom_linear_solve":
        return of_jaxpr(params["jaxprs"].solve, trips)
    if name == "while":
        body = of_jaxpr(params["body_jaxpr"], trips) + of_jaxpr(params["cond_jaxpr"], trips)
        if body and trips is None:
            raise ValueError("a while loop has matrix products: pass its number of trips")
        return body * (trips or 0)
    if name == "pallas_call":
        raise NotImplementedError("what a kernel does is not in its program")
    return sum(of_jaxpr(inner, trips) for inner in _inner(params.values()))


def _inner(values):
    """The programs among the parameters of a call."""
    for value in values:
        if isinstance(value, (Jaxpr, ClosedJaxpr)):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inner(value)
