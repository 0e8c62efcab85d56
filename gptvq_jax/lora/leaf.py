"""The adapters of a block while they are trained: beside its dense weights, with dropout."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gptvq_jax.models.llama import Params, get_layer, with_layer
from gptvq_jax.ops.lora import LoraKernel, low_rank, times_base

Leaf = dict[str, jax.Array]  # "a" (rank, in) and "b" (out, rank), float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DroppedLora(LoraKernel):
    """y = x W + s (d(x) A^T) B^T, where d drops a share of the inputs and scales the others."""

    key: jax.Array
    rate: float = dataclasses.field(metadata={"static": True})

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        dropped = jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)
        return times_base(x, self.base) + low_rank(dropped, self.a, self.b, self.scale)


def with_adapters(
    block: Params, adapters: Mapping[str, Leaf], scale: jax.Array, key: jax.Array, rate: float
) -> Params:
    """The block with the adapters beside its weights.

    Args:
      block: parameters, kernels (in, out).
      adapters: by layer of the block.
      scale: of all of them.
      key: of the dropout; each layer folds its number into it.
      rate: of the dropout.
    """
    for number, (name, leaf) in enumerate(sorted(adapters.items())):
        fields = get_layer(block, name)["kernel"], leaf["a"], leaf["b"], scale
        if rate:
            kernel = DroppedLora(*fields, jax.random.fold_in(key, number), rate)
        else:
            kernel = LoraKernel(*fields)
        block = with_layer(block, name, kernel)
    return block
