"""Small Flax models whose layers are all 8 x 8, so that one program quantizes them."""

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
        self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=WIDTH, decode=False, rngs=rngs
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.LinearGeneral(WIDTH, (2, 4), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(jnp.tanh(self.inner(x))))
        return self.head(self.dropout(x))


def images(count=2, batch=6, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, 4, 4, 2)).astype(np.float32) for _ in range(count)]


def net():
    model = Net()
    return model, model.init(jax.random.key(0), images()[0])
