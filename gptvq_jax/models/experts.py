"""Feed-forward layers of which every token meets a few: a router, and experts (Mixtral, Qwen3-MoE).

    y_t = sum of p_te down_e(act(gate_e(x_t)) * up_e(x_t)) over the k experts e of the largest p_te

where p_t is the softmax of the router's outputs for token t; its k values may be divided by their
sum. A token with one of its k experts is a slot. The slots of an expert are multiplied together, in
blocks of a few rows, and no expert by tokens that are not its own. So the work is that of k experts
a token, and what fills up the last block of an expert: at most half of that again. Blocks run one
after another, each as a branch of its expert, whose weights may be packed in any way. Experts whose
packed arrays have the same shapes are stacked where they stay in memory, and share one branch: a
program then has the same size for any number of them (`stack_experts`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.layers import ACTIVATIONS, Linear, is_dense, multiply, precision

_MOST_ROWS = 128  # of a block of rows


class Routes(NamedTuple):
    """Where tokens (..., T) go."""

    experts: jax.Array  # (..., T, k) int32
    weights: jax.Array  # (..., T, k) float32, the factors of what these put out


class Routed(NamedTuple):
    """What the layers of a stage of experts read."""

    inputs: jax.Array  # (..., T, in), or (..., T, k, in) where the slots of a token differ
    routes: Routes


class Grouping(NamedTuple):
    """Slots sorted by expert, in blocks of equally many rows of one expert."""

    slots: jax.Array  # (M,) int32, the slot in a row; as many as there are slots: none is
    experts: jax.Array  # (M / rows of a block,) int32, ascending; as many as there are: none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """The weights of one layer of all experts, as one: every array has them one after another."""

    weights: Any

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.weights)[0])

    def of(self, number: jax.Array) -> Any:
        """The weight of an expert."""
        return jax.tree.map(lambda arrays: arrays[number], self.weights)


def stack_experts(config: ModelConfig, block: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of a block with its experts stacked, in "experts" in place of each by itself.

    As they are where the arrays of a layer differ from expert to expert, as lists of outliers do.

    Args:
      config: of the block.
      block: its parameters, dense or packed.
    """
    if not config.experts:
        return block
    names, stacked = config.family.experts, {}
    each = [block[names.module][f"experts_{number}"] for number in range(config.experts)]
    for layer in names.layers:
        weights = [expert[layer]["kernel"] for expert in each]
        if len({_layout(weight) for weight in weights}) > 1:
            return block
        together = jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights)
        stacked[layer] = {"kernel": Stacked(together)}
    rest = {n: p for n, p in block[names.module].items() if not n.startswith("experts_")}
    return {**block, names.module: {**rest, "experts": stacked}}


def _layout(weight: Any) -> tuple[Any, ...]:
    arrays = [(array.shape, str(array.dtype)) for array in jax.tree.leaves(weight)]
    return jax.tree.structure(weight), *arrays


def route(logits: jax.Array, count: int, normalize: bool) -> Routes:
    """The `count` likeliest experts of each token, from the router's outputs (..., T, experts)."""
    weights, experts = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), count)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routes(experts.astype(jnp.int32), weights)


def block_rows(slots: int, experts: int) -> int:
    """Rows of a block, a power of two: at most half of what an expert gets on average."""
    most = min(_MOST_ROWS, slots // (2 * experts))
    return 1 << (max(most, 1).bit_length() - 1)


def group(experts: jax.Array, count: int) -> Grouping:
    """Sorts slots whose experts are given, (S,), of `count` experts."""
    slots, rows = len(experts), block_rows(len(experts), count)
    blocks = min(slots, (slots + count * (rows - 1)) // rows)
    sizes = jnp.bincount(experts, length=count)
    ends = jnp.cumsum(-(-sizes // rows))  # in blocks, which an expert shares with no other
    order = jnp.argsort(experts, stable=True)
    expert = experts[order]
    within = jnp.arange(slots) - (jnp.cumsum(sizes) - sizes)[expert]
    row = (ends - -(-sizes // rows))[expert] * rows + within
    filled = jnp.full(blocks * rows, slots, jnp.int32).at[row].set(order.astype(jnp.int32))
    of_block = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return Grouping(filled, of_block.astype(jnp.int32))


def grouped_matmul(
    rows: jax.Array, kernels: Sequence[Any] | Stacked, experts: jax.Array, features: int
) -> jax.Array:
    """Multiplies each block of rows (M, in) by the kernel of its expert, giving (M, features).

    Args:
      rows: as many in each block.
      kernels: of the experts, arrays (in, features) or what implements `x @ kernel`; only arrays
        have gradients.
      experts: (blocks,) int32, ascending; `len(kernels)` for a block of zeros, which costs nothing.
      features: width of the result.
    """
    if isinstance(kernels, Stacked):
        return _by_block(rows, kernels, experts, features)
    kernels = tuple(kernels)
    if all(map(is_dense, kernels)):
        return _product(rows, kernels, experts, features)
    return _by_block(rows, kernels, experts, features)


def _by_block(rows, kernels, experts, features) -> jax.Array:
    """Each kernel is in a branch of its own: those that no block wants are not even decoded."""

    def times(kernel, x):
        return multiply(x, kernel, features, name="an expert's layer")

    def nothing(x):
        return jnp.zeros((len(x), features), x.dtype)

    def multiplied(block):
        x, number = block
        if isinstance(kernels, Stacked):
            own = lambda x: times(kernels.of(number), x)  # noqa: E731
            return lax.cond(number < len(kernels), own, nothing, x)
        branches = [functools.partial(times, kernel) for kernel in kernels]
        return lax.switch(number, [*branches, nothing], x)

    blocks = rows.reshape(len(experts), -1, rows.shape[-1])
    return lax.map(multiplied, (blocks, experts)).reshape(len(rows), features)


_product = jax.custom_vjp(_by_block, nondiff_argnums=(3,))


def _forward(rows, kernels, experts, features):
    return _by_block(rows, kernels, experts, features), (rows, kernels, experts)


def _backward(features, kept, gradient):
    # Differentiating the branches would keep, for every block, what all of them might need.
    rows, kernels, experts = kept
    of_rows = _by_block(gradient, tuple(k.T for k in kernels), experts, rows.shape[-1])
    x = rows.reshape(len(experts), -1, rows.shape[-1])
    dy = gradient.reshape(len(experts), -1, features)

    def of_kernel(number, kernel):
        def add(block, total):
            return total + jnp.matmul(x[block].T, dy[block], precision=precision(x.dtype))

        first, last = (jnp.searchsorted(experts, number, side=side) for side in ("left", "right"))
        return lax.fori_loop(first, last, add, jnp.zeros(kernel.shape, x.dtype)).astype(
            kernel.dtype
        )

    return of_rows, tuple(of_kernel(i, kernel) for i, kernel in enumerate(kernels)), None


_product.defvjp(_forward, _backward)


class Experts(nn.Module):
    """Router and experts of a block.

    It sows what their layers read as "gate_inputs" and "feed_inputs", and "routes" with either. A
    variable "experts" in the collection "perturbations", {layer: {"outputs": (..., T, k,
    features)}}, is added to the outputs of slots; see layers.Linear.
    """

    config: ModelConfig

    def setup(self):
        names = self.config.family.experts
        setattr(self, names.router, Linear(self.config.experts, out_dtype=jnp.float32))
        for name in () if self._are_stacked() else self._each():
            # Not self.param where there are weights: it insists on the shapes of dense kernels.
            if not self.has_variable("params", name):
                self.param(name, self._new_expert)

    def routes(self, x: jax.Array) -> Routes:
        """Of tokens (..., T, hidden)."""
        config = self.config
        logits = getattr(self, config.family.experts.router)(x)
        return route(logits, config.experts_per_token, config.normalize_experts)

    def gated(self, x: jax.Array, routes: Routes | None = None) -> jax.Array:
        """What the last layers of experts read, by slot: (..., T, hidden) -> (..., T, k * size).

        Args:
          x: tokens.
          routes: by default their own.
        """
        config = self.config
        routes = self.routes(x) if routes is None else routes
        self._sow("gate_inputs", x, routes)
        groups = group(routes.experts.reshape(-1), config.experts)
        tokens = x.reshape(-1, x.shape[-1])
        rows = _take(tokens, groups.slots // config.experts_per_token)
        gate, up, _ = config.family.experts.layers
        opened = ACTIVATIONS[config.hidden_act](self._layer(gate, rows, groups, routes))
        opened = opened * self._layer(up, rows, groups, routes)
        return opened.reshape(*x.shape[:-1], -1)

    def output(self, x: jax.Array, gated: jax.Array) -> jax.Array:
        """What the block adds to its x, from the normed x and what `gated` gave for it."""
        routes = self.routes(x)
        inner = gated.reshape(*routes.experts.shape, self.config.expert_size)
        self._sow("feed_inputs", inner, routes)
        groups = group(routes.experts.reshape(-1), self.config.experts)
        rows = _take(inner.reshape(-1, inner.shape[-1]), groups.slots)
        outputs = self._layer(self.config.family.experts.layers[2], rows, groups, routes)
        return jnp.sum(outputs * routes.weights[..., None].astype(outputs.dtype), axis=-2)

    def _layer(self, layer: str, rows: jax.Array, groups: Grouping, routes: Routes) -> jax.Array:
        """Outputs (..., T, k, features) of slots, from the rows of their grouping."""
        features = self._shapes()[layer][1]
        if self._are_stacked():
            kernels = self.get_variable("params", "experts")[layer]["kernel"]
        else:
            kernels = [self.get_variable("params", name)[layer]["kernel"] for name in self._each()]
        made = grouped_matmul(rows, kernels, groups.experts, features)
        shape = routes.experts.shape
        outputs = jnp.zeros((routes.experts.size, features), made.dtype)
        outputs = outputs.at[groups.slots].set(made, mode="drop").reshape(*shape, features)
        if self.has_variable("perturbations", "experts"):
            outputs = outputs + self.get_variable("perturbations", "experts")[layer]["outputs"]
        return outputs

    def _sow(self, name: str, inputs: jax.Array, routes: Routes) -> None:
        self.sow("intermediates", name, inputs)
        self.sow("intermediates", "routes", routes)

    def _are_stacked(self) -> bool:
        return self.has_variable("params", "experts")

    def _each(self) -> list[str]:
        return [f"experts_{number}" for number in range(self.config.experts)]

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Of the layers of an expert, (in, out)."""
        hidden, inner = self.config.hidden_size, self.config.expert_size
        gate, up, down = self.config.family.experts.layers
        return {gate: (hidden, inner), up: (hidden, inner), down: (inner, hidden)}

    def _new_expert(self, key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 3)
        new = nn.initializers.lecun_normal()
        shapes = self._shapes().items()
        return {n: {"kernel": new(k, shape)} for k, (n, shape) in zip(keys, shapes, strict=True)}


def _take(rows: jax.Array, numbers: jax.Array) -> jax.Array:
    """Some rows; zeros for one that there is not."""
    return jnp.take(rows, numbers, axis=0, mode="fill", fill_value=0)
