"""Steps of AdamW on the parameters of stored leaves, whatever the loss.

A parameter counts by what it has moved since its codes were chosen, in units of the root mean
square of its array then: a rate of 0.003 moves entries by a few thousandths of what is usual in
their array, and weight decay pulls them back to where they were. Programs are compiled for each
kind of leaf, so that those of the weights in between can be the same for all blocks of a model.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptvq_jax.methods import trainable
from gptvq_jax.methods.leaf_codes import pack_again
from gptvq_jax.methods.trainable import (
    CODEBOOKS,
    VALUES,
    Leaf,
    Parameters,
    Unpacked,
    parameters,
    with_codes,
)
from gptvq_jax.moves.refit import root_mean_square


class LeafState(NamedTuple):
    """Of one leaf."""

    params: Parameters
    adam: optax.OptState
    sizes: Parameters  # root mean squares of the arrays at the start: the unit of a step
    codes: jax.Array | None = None  # in place of those that `unpack` found; None: those


class Rates(NamedTuple):
    """Of a step: of codebooks (centroids, factors, levels), of scales, of norms and biases."""

    codebooks: float
    scales: float
    dense: float
    b1: float
    b2: float
    weight_decay: float = 0.0

    def of(self, name: str) -> float:
        """That of a parameter."""
        if name == VALUES:
            return self.dense
        return self.codebooks if name in CODEBOOKS else self.scales


@jax.jit
def start(unpacked: Unpacked) -> LeafState:
    """That of the leaf as it is."""
    params = parameters(unpacked.leaf)
    sizes = {name: _size(name, values) for name, values in params.items()}
    return LeafState(params, _adamw(Rates(0.0, 0.0, 0.0, 0.0, 0.0)).init(params), sizes)


def _size(name: str, values: jax.Array) -> jax.Array:
    """Root mean square; of outliers, which zeros fill up, of those that are not 0."""
    size = root_mean_square(values)
    if name != "outlier_values":
        return size
    return size * jnp.sqrt(values.size / jnp.maximum(jnp.count_nonzero(values), 1))


_decode = jax.jit(trainable.decode)
_rounded = jax.jit(trainable.with_parameters)


def coded(unpacked: Unpacked, state: LeafState) -> Unpacked:
    """The leaf with the codes of a state."""
    return unpacked if state.codes is None else unpacked._replace(codes=state.codes)


def decode(unpacked: Unpacked, state: LeafState) -> jax.Array:
    """What the leaf stands for in a state, as `trainable.decode` gives it."""
    return _decode(coded(unpacked, state), state.params)


def pull_back(unpacked: Unpacked, state: LeafState, gradient: jax.Array) -> Parameters:
    """The gradient with respect to parameters, from that with respect to what `decode` gives.

    Args:
      unpacked, state: as `decode` takes them.
      gradient: in the shape of the weight, (R, C).
    """
    return _pull_back(coded(unpacked, state), state.params, gradient)


@jax.jit
def _pull_back(unpacked: Unpacked, params: Parameters, gradient: jax.Array) -> Parameters:
    _, pullback = jax.vjp(partial(trainable.decode, unpacked), params)
    (found,) = pullback(gradient)
    return found


def update(
    unpacked: Unpacked, state: LeafState, gradients: Parameters, rates: Rates
) -> tuple[LeafState, jax.Array]:
    """A step of AdamW, given `pull_back`'s gradients; and whether all of it is finite."""
    bare = unpacked._replace(codes=None)
    moved, finite = _update(bare, state._replace(codes=None), gradients, rates)
    return moved._replace(codes=state.codes), finite


@jax.jit
def _update(
    unpacked: Unpacked, state: LeafState, gradients: Parameters, rates: Rates
) -> tuple[LeafState, jax.Array]:
    params, adam, sizes, _ = state
    relative = jax.tree.map(jnp.multiply, gradients, sizes)
    moved = relative_moves(unpacked, state)
    updates, adam = _adamw(rates).update(relative, adam, moved)
    params = {
        name: params[name] + rates.of(name) * sizes[name] * change
        for name, change in updates.items()
    }
    finite = [jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)]
    return LeafState(params, adam, sizes), jnp.all(jnp.stack(finite))


def stored(leaf: Leaf, unpacked: Unpacked, state: LeafState) -> Leaf:
    """The leaf with the parameters of a state, as `decode` has rounded them, and its codes.

    Args:
      leaf: as it was before its codes were cut out.
      unpacked: what `unpack` made of it.
      state: of it.
    """
    rounded = with_codes(leaf, _rounded(unpacked.leaf, state.params))
    return rounded if state.codes is None else pack_again(rounded, state.codes)


def relative_moves(unpacked: Unpacked, state: LeafState) -> Parameters:
    """How far every entry has come from where it began, in units of the size of its array."""
    begun = parameters(unpacked.leaf)
    return {name: (p - begun[name]) / state.sizes[name] for name, p in state.params.items()}


@jax.jit
def distances(unpacked: Unpacked, state: LeafState) -> Parameters:
    """{name of a parameter: root mean square of `relative_moves`}."""
    moves = relative_moves(unpacked, state)
    return jax.tree.map(lambda moved: jnp.sqrt(jnp.mean(jnp.square(moved))), moves)


def _adamw(rates: Rates) -> optax.GradientTransformation:
    # At rate 1, that of each parameter is multiplied in where it is known. The more parameters
    # share a loss, the smaller is the gradient of each: nothing to add to it.
    decay = rates.weight_decay
    return optax.adamw(1.0, rates.b1, rates.b2, eps=1e-12, weight_decay=decay)
