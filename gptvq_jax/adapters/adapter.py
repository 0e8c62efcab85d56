"""Low-rank adapters of a model's linear layers: beside its weights, or merged into them.

Layers are named as everywhere, "layers_3/self_attn/q_proj"; of one block, "self_attn/q_proj".
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptvq_jax.models.llama import Params, get_layer, with_layer
from gptvq_jax.ops.lora import LoraKernel


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What is added to the weight of one layer: scale * B A, (out, in)."""

    a: np.ndarray  # (rank, in) float32
    b: np.ndarray  # (out, rank) float32
    scale: float

    def beside(self, base: Any) -> LoraKernel:
        """A leaf of the weight, packed or dense, with this beside it."""
        return LoraKernel(
            base, jnp.asarray(self.a), jnp.asarray(self.b), jnp.asarray(self.scale, jnp.float32)
        )

    def merged(self, kernel: Any) -> Any:
        """A dense kernel (in, out) with this added, float32, where the kernel is."""
        xp = np if isinstance(kernel, np.ndarray) else jnp
        precision = {} if xp is np else {"precision": "highest"}
        added = xp.matmul(xp.asarray(self.b), xp.asarray(self.a), **precision)
        return kernel + np.float32(self.scale) * added.T


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapters of a model.

    Attributes:
      layers: by name; one that is not in it is as it was.
      base_name: of the model that they were trained on, as their file calls it; None: it does not.
    """

    layers: Mapping[str, LowRank]
    base_name: str | None = None

    def of_block(self, index: int) -> dict[str, LowRank]:
        """Those of block `index`, by their names in it."""
        prefix = f"layers_{index}/"
        return {
            name.removeprefix(prefix): layer
            for name, layer in self.layers.items()
            if name.startswith(prefix)
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, scales and values."""
        digest = hashlib.sha256()
        for name, layer in sorted(self.layers.items()):
            digest.update(f"{name} {layer.a.shape} {layer.b.shape} {layer.scale!r} ".encode())
            digest.update(np.ascontiguousarray(layer.a).tobytes())
            digest.update(np.ascontiguousarray(layer.b).tobytes())
        return digest.hexdigest()


def beside(adapter: Adapter, params: Params, num_blocks: int) -> dict[str, Any]:
    """The tree of a model with the adapters beside its weights; shares all else.

    Args:
      adapter: of this model.
      params: the tree of models/llama.py, with any kind of kernel.
      num_blocks: of the model.
    """
    blocks = {
        f"layers_{index}": _changed(params[f"layers_{index}"], adapter.of_block(index), "beside")
        for index in range(num_blocks)
    }
    return {**params, **blocks}


def merged(block: Params, layers: Mapping[str, LowRank]) -> Params:
    """A dense block, kernels (in, out), with what its adapters add; shares all else."""
    return _changed(block, layers, "merged")


def _changed(block: Params, layers: Mapping[str, LowRank], how: str) -> Params:
    for name, layer in layers.items():
        kernel = get_layer(block, name)["kernel"]
        block = with_layer(block, name, getattr(layer, how)(kernel))
    return block
