"""AdamW with a limit on the gradient; the learning rate rises, and falls along a cosine."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptvq_jax.lora.frozen_model import Adapters
from gptvq_jax.lora.settings import LoraSettings


class State(NamedTuple):
    """What a step changes."""

    adapters: Adapters
    adam: optax.OptState


def start(shapes: dict[str, tuple[int, int]], settings: LoraSettings) -> State:
    """A as PEFT begins, uniform within 1 / sqrt(in); B is 0, so that the model is as it was.

    Args:
      shapes: (out, in) of each layer that gets an adapter.
      settings: their rank, and the seed.
    """
    draws = np.random.default_rng(settings.seed)
    adapters = {}
    for name, (rows, cols) in shapes.items():
        a = draws.uniform(-1, 1, (settings.rank, cols)) / np.sqrt(cols)
        b = jnp.zeros((rows, settings.rank), jnp.float32)
        adapters[name] = {"a": jnp.asarray(a, jnp.float32), "b": b}
    return State(adapters, _adam(settings.clip, settings.weight_decay).init(adapters))


def learning_rate(step: int, settings: LoraSettings) -> float:
    """Of step 1, 2, ...: after the warm-up it falls from `lr`, to 0 behind the last step."""
    if step <= settings.warmup:
        return settings.lr * step / settings.warmup
    done = (step - settings.warmup) / (settings.steps + 1 - settings.warmup)
    return float(settings.lr * 0.5 * (1 + np.cos(np.pi * done)))


def updated(
    state: State, gradient: Adapters, rate: float, settings: LoraSettings
) -> tuple[State, float]:
    """The state after a step, and the norm of the gradient."""
    state, norm = _updated(state, gradient, rate, settings.clip, settings.weight_decay)
    return state, float(norm)


@partial(jax.jit, static_argnames=("clip", "decay"))
def _updated(state, gradient, rate, clip, decay):
    updates, adam = _adam(clip, decay).update(gradient, state.adam, state.adapters)
    adapters = jax.tree.map(lambda p, u: p - rate * u, state.adapters, updates)
    squares = [jnp.vdot(part, part) for part in jax.tree.leaves(gradient)]
    return State(adapters, adam), jnp.sqrt(sum(squares))


def _adam(clip: float, decay: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.scale_by_adam(), optax.add_decayed_weights(decay)
    )


def to_host(state: State) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a state, by number."""
    leaves = jax.tree.leaves(state)
    return {str(i): np.atleast_1d(np.asarray(leaf)) for i, leaf in enumerate(leaves)}


def from_host(arrays: dict[str, np.ndarray], like: State) -> State:
    """The inverse, given a state of the same settings.

    Raises:
      ValueError: the arrays are those of others.
    """
    leaves, structure = jax.tree.flatten(like)
    found = [arrays.get(str(i)) for i in range(len(leaves))]
    if any(
        a is None or (a.size, a.dtype) != (leaf.size, leaf.dtype)
        for a, leaf in zip(found, leaves, strict=True)
    ):
        raise ValueError("its arrays are those of another adapter")
    put = [jnp.asarray(a.reshape(leaf.shape)) for a, leaf in zip(found, leaves, strict=True)]
    return jax.tree.unflatten(structure, put)
