"""How much calibration tokens count for each layer: arrays by layer, and of experts by slot.

A layer that all tokens meet has (n, T, g), for g groups of its rows. A layer of an expert meets few
tokens: those of all experts are kept together under the layer's `layer_kind`, (n, T, k, g)
for the k experts of a token, and which these are under ROUTES, (n, T, k). So memory is that of k
experts a token, however many there are.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.console.layer_kind import layer_kind
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.experts import Routes
from gptvq_jax.models.stages import expert_of

ROUTES = "routes"
Weights = Mapping[str, np.ndarray]


def shapes(config: ModelConfig, tokens: tuple[int, int], groups: int) -> dict[str, tuple[int, ...]]:
    """Of the arrays of a block, {name: shape}; `tokens` is (n, T)."""
    slots = (*tokens, config.experts_per_token)
    found: dict[str, tuple[int, ...]] = {}
    for name in config.linear_layers:
        own = expert_of(name) is None
        found[layer_kind(name)] = (*(tokens if own else slots), groups)
    return found | ({ROUTES: slots} if config.experts else {})


def keys_of(names: Mapping[str, object] | set[str]) -> list[str]:
    """Names of the arrays that say something of some layers."""
    routes = [ROUTES] if any(expert_of(name) is not None for name in names) else []
    return [*dict.fromkeys(layer_kind(name) for name in names), *routes]


def num_groups(weights: Weights, name: str) -> int:
    """Of the rows of a layer."""
    return weights[layer_kind(name)].shape[-1]


def relative(
    config: ModelConfig, weights: Weights, power: float = 1.0, num_fitted: int | None = None
) -> dict[str, np.ndarray]:
    """weights^power over their mean in each row group, of an expert over the tokens it got.

    Args:
      config: of the block.
      weights: its arrays.
      power, num_fitted: of `relative_weights`.
    """
    found = {}
    for name, array in weights.items():
        if name == ROUTES:
            found[name] = array
        elif array.ndim == 4:
            routes = weights[ROUTES]
            found[name] = _relative_slots(array, routes, config.experts, power, num_fitted)
        else:
            found[name] = relative_weights(array, power, num_fitted)
    return found


def relative_weights(
    weights: np.ndarray, power: float = 1.0, num_fitted: int | None = None
) -> np.ndarray:
    """weights^power over their mean in each row group; 1 where all are 0.

    Squared gradients have long tails: in SmolLM2 half of their sum is often on 1 % of the tokens,
    fewer than a layer has inputs. A power below 1 keeps such a Hessian from being that of noise.

    Args:
      weights: of the tokens (n, T, g).
      power: above 0.
      num_fitted: the mean is of so many windows, from the first; None: of all.
    """
    weights = np.power(weights, power, dtype=np.float64)
    return _over(weights, weights[:num_fitted].mean(axis=(0, 1)))


def _relative_slots(weights, routes, experts, power, num_fitted) -> np.ndarray:
    weights = np.power(weights, power, dtype=np.float64)
    sums, counts = _by_expert(weights[:num_fitted], routes[:num_fitted], experts)
    return _over(weights, (sums / np.maximum(counts, 1)[:, None])[routes])


def _over(weights: np.ndarray, means: np.ndarray) -> np.ndarray:
    return np.where(means > 0, weights / np.where(means > 0, means, 1.0), 1.0).astype(np.float32)


def _by_expert(weights, routes, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums (experts, g) of the weights of slots, and how many there are (experts,)."""
    of_slots, flat = weights.reshape(-1, weights.shape[-1]), routes.reshape(-1)
    sums = [np.bincount(flat, of_group, experts) for of_group in of_slots.T]
    return np.stack(sums, axis=-1), np.bincount(flat, minlength=experts)


def means(config: ModelConfig, weights: Weights, name: str, share: float = 0.0) -> np.ndarray:
    """Mean over all tokens of the weight that a layer's row groups have (g,), float64.

    A token that an expert does not get weighs nothing there.

    Args:
      config: of the block.
      weights: its arrays.
      name: of the layer.
      share: of an expert, how much of it is taken from the mean expert (experts.shares): one that
        no token reached is not one that none ever will.
    """
    array, number = weights[layer_kind(name)], expert_of(name)
    if number is None:
        return array.mean(axis=(0, 1), dtype=np.float64)
    sums, _ = _by_expert(array.astype(np.float64), weights[ROUTES], config.experts)
    sums /= array.shape[0] * array.shape[1]
    return (1 - share) * sums[number] + share * sums.mean(axis=0)


def of_slots(weights: Mapping[str, jax.Array], kind: str, group: int, routes: Routes) -> jax.Array:
    """Weights (..., T, k) that slots have for a kind of layer of their experts.

    Where a model that is quantized sends a token to another expert than the float model, whose
    gradients these are, it has the mean weight, 1.

    Args:
      weights: `relative` ones, of the same tokens.
      kind, group: of the layer, and of its rows.
      routes: of the slots.
    """
    own = weights[kind][..., group]
    same = weights[ROUTES][..., None, :] == routes.experts[..., :, None]
    found = jnp.sum(jnp.where(same, own[..., None, :], 0.0), axis=-1)
    return jnp.where(jnp.any(same, axis=-1), found, 1.0)
