"""Random adapters of tiny models."""

import numpy as np

from gptvq_jax.adapters.adapter import Adapter, LowRank
from gptvq_jax.lora.targets import target_shapes


def random_adapter(config, targets=("q_proj", "v_proj", "down_proj"), rank=3, scale=2.0, seed=0):
    """Of these layers of all blocks, with B that is not 0."""
    draws = np.random.default_rng(seed)

    def normal(*shape):
        return draws.normal(size=shape).astype(np.float32) / 4

    shapes = target_shapes(config, targets)
    layers = {
        name: LowRank(normal(rank, cols), normal(rows, rank), scale)
        for name, (rows, cols) in shapes.items()
    }
    return Adapter(layers, "tiny")
