"""Loops and branches of a program with weights in them.

What a Reader has added up goes through them as the program's own values do. Each function takes the
parameters of the step, its inputs and the reader; `run(program, values)` gives the results of a
program inside, and `dense(values, what)` arrays where a weight cannot go on as one.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from gptvq_jax.flax_tree.products import is_weight


def _scan(params, inputs, reader, run, dense) -> list[Any]:
    """Weights that every turn reads stay in the loop; stacked ones are read turn by turn."""
    body, count = params["jaxpr"], params["num_carry"]
    shared, rest = inputs[: params["num_consts"]], inputs[params["num_consts"] :]
    carry, rows = dense(rest[:count], "the carry of a scan"), rest[count:]
    options = {"length": params["length"], "reverse": params["reverse"]}

    def turn(carry, row):
        out = dense(run(body, [*shared, *carry, *row]), "a scan")
        return out[:count], out[count:]

    if any(map(is_weight, rows)):
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
        row = [dataclasses.replace(v, view=v.view.at(i)) if is_weight(v) else v[i] for v in rows]
        carry, out[i] = turn(carry, row)
    return [*carry, *(jnp.stack(values) for values in zip(*out, strict=True))]


def _cond(params, inputs, reader, run, dense) -> list[Any]:
    index, operands = inputs[0], inputs[1:]

    def branch(program):
        def taken(state, arrays):
            reader.state, arrays = state, iter(arrays)
            values = [v if is_weight(v) else next(arrays) for v in operands]
            out = dense(run(program, values), "a branch")
            return reader.state, out

        return taken

    arrays = [v for v in operands if not is_weight(v)]
    branches = [branch(program) for program in params["branches"]]
    reader.state, out = lax.switch(index, branches, reader.state, arrays)
    return out


def _while(params, inputs, reader, run, dense) -> list[Any]:
    first, count = params["cond_nconsts"], params["body_nconsts"]
    of_test, of_body = inputs[:first], inputs[first : first + count]
    start = dense(inputs[first + count :], "the carry of a loop")

    def test(state):
        reader.state, values = state
        return run(params["cond_jaxpr"], [*of_test, *values])[0]

    def body(state):
        reader.state, values = state
        out = run(params["body_jaxpr"], [*of_body, *values])
        return reader.state, dense(out, "a loop")

    reader.state, out = lax.while_loop(test, body, (reader.state, start))
    return out


CONTROL_FLOW = {"scan": _scan, "cond": _cond, "while": _while}
