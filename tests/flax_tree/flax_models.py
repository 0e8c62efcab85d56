"""Small Flax models whose layers are all 8 x 8, so that one program quantizes them.

Their parameters are drawn by NumPy: initializers would be compiled.
"""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH = 8


class Block(nn.Module):
    """Attention and a layer that is called twice."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        shared = nn.Dense(WIDTH, name="shared")
        return x + jnp.tanh(shared(jnp.tanh(shared(x))))


class Net(nn.Module):
    """Patches of an image, a block, an einsum, and a head that reads the mean."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (2, 2), strides=(2, 2), name="patches")(images)
        x = x.reshape(len(x), -1, WIDTH)
        x = x + self.param("positions", nn.initializers.normal(), x.shape[1:])
        x = Block(name="block")(x)
        x = nn.Einsum((WIDTH, WIDTH), "btd,df->btf", name="mix")(x)
        return nn.Dense(WIDTH, name="head")(x.mean(1))


LAYERS = (
    *("patches", "block/attention/query", "block/attention/key", "block/attention/value"),
    *("block/attention/out", "block/shared", "mix", "head"),
)


class Mixer(nnx.Module):
    """The like in NNX, with dropout, and layers in a list."""

    def __init__(self, rngs):
        rng = np.random.default_rng(0)
        drawn = {"kernel_init": lambda key, shape, dtype: normal(rng, shape, dtype), "rngs": rngs}
        self.inner = nnx.Linear(WIDTH, WIDTH, **drawn)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, **drawn)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.LinearGeneral(WIDTH, (2, 4), **drawn)

    def __call__(self, x):
        x = x + self.attention(self.norm(jnp.tanh(self.inner(x))))
        return self.head(self.dropout(x))


def images(count=2, batch=6, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, 4, 4, 2)).astype(np.float32) for _ in range(count)]


def normal(rng, shape, dtype=np.float32):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(WIDTH), dtype)


def variables_of(model, x, **options):
    """Of a Linen module."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **options))
    return jax.tree.map(lambda leaf: normal(rng, leaf.shape, leaf.dtype), shapes)


@cache
def net():
    model = Net()
    return model, variables_of(model, images()[0])
