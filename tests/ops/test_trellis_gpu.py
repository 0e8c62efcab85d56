"""Trellis codes on GPUs beyond the common cases: programs that share columns, sizes, refusals."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base import relative_error
from float64 import decode
from real_shapes import trellis_tensor

from gptvq_jax.core.packing import pack as pack_bits
from gptvq_jax.ops.gpu import trellis
from gptvq_jax.ops.gpu.trellis import Tile
from gptvq_jax.study.sample_tensors import random_trellis

# 170 columns are 3 steps of rate 1 and 4 of rate 3; 10 chunks are programs that end short.
TENSOR = dataclasses.replace(
    random_trellis(300, 170, 12, 64), rates=np.asarray(pack_bits(np.array([3] * 100 + [1] * 70), 4))
)
TILES = {
    "one program": Tile(16, 1, 3, False),
    "a split past the end": Tile(4, 5, 1, False),
    "tensor cores": Tile(16, 2, 16, True),
}


def error(run, x):
    packed = trellis.pack(TENSOR)
    options = {"xla_backend_optimization_level": 0}
    y = jax.jit(run, compiler_options=options)(x, packed)
    return relative_error(y, np.asarray(x, np.float64) @ decode(TENSOR).T)


@pytest.mark.parametrize(
    "name",
    ["one program", "a split past the end", pytest.param("tensor cores", marks=pytest.mark.slow)],
)
def test_tiles(name, monkeypatch):
    tile = TILES[name]
    monkeypatch.setattr(trellis, "choose_tile", lambda *_: tile)
    dtype = jnp.bfloat16 if tile.tensor_cores else jnp.float32
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 170)), dtype)
    assert error(partial(trellis.matmul, interpret=True), x) < (5e-3 if tile.tensor_cores else 1e-5)


def test_many_rows_are_multiplied_by_a_decoded_weight(monkeypatch):
    monkeypatch.setattr(trellis, "run_kernel", None)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(65, 170)), jnp.float32)
    assert error(trellis.matmul, x) < 1e-5


def test_no_rows_and_columns_without_codes():
    none = dataclasses.replace(TENSOR, rates=np.zeros_like(TENSOR.rates))
    assert trellis.matmul(jnp.zeros((0, 170)), trellis.pack(TENSOR)).shape == (0, 300)
    y = trellis.matmul(jnp.eye(170), trellis.pack(none), interpret=True)
    np.testing.assert_allclose(y.T, decode(none), rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 16, 64])
def test_programs_cover_the_weight(batch):
    packed = trellis.pack(trellis_tensor(8))
    tile = trellis.choose_tile(packed.layout, batch, jnp.bfloat16)
    programs = -(-packed.layout.chunks // tile.chunks) * tile.splits * -(-batch // tile.batch)
    assert 132 <= programs <= 1024  # every SM of an H100 has work
    assert tile.splits <= max(cols for _, cols in packed.layout.runs) // 32


def test_stays_packed():
    packed = trellis.pack(trellis_tensor(8))
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
    assert num_bytes <= 1.06 * trellis_tensor(8).num_bytes


def test_words_beyond_32_bits_are_refused():
    codes = jax.ShapeDtypeStruct((2**32 + 1,), jnp.uint8)
    with pytest.raises(NotImplementedError, match="64-bit indices"):
        trellis.check(dataclasses.replace(TENSOR, codes=codes))
