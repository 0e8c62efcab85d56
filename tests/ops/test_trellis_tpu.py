"""Trellis codes on TPUs beyond the common cases: layouts, ways to look up, refusals."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base import relative_error
from float64 import decode
from jax.experimental import pallas as pl
from real_shapes import trellis_tensor

from gptvq_jax.core.packing import pack as pack_bits
from gptvq_jax.core.trellis_table import gaussian_values
from gptvq_jax.ops.tpu import tables, trellis
from gptvq_jax.ops.tpu.trellis_values import CURVE, DIRECT, RANKED, Values
from gptvq_jax.study.sample_tensors import random_trellis


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """As in test_pallas_tpu.py: an interpreter has no latency to hide."""
    monkeypatch.setattr(trellis, "_CYCLES", 1)
    monkeypatch.setattr(tables, "_TOGETHER", 10**6)


def of_rates(tensor, rates):
    """The tensor with other rates, whose streams are what the stored bytes begin with."""
    return dataclasses.replace(tensor, rates=np.asarray(pack_bits(np.asarray(rates), 4)))


def error(tensor, dtype, batch=3):
    x = np.random.default_rng(0).normal(size=(batch, tensor.cols))
    x = jnp.asarray(x, dtype)
    options = {"xla_backend_optimization_level": 0}
    run = jax.jit(partial(trellis.matmul, interpret=True), compiler_options=options)
    expected = np.asarray(x, np.float64) @ decode(tensor).T
    return relative_error(run(x, trellis.pack(tensor)), expected)


@pytest.mark.parametrize(
    ("bits", "level_bits", "narrow", "way", "cycles"),
    [
        (8, None, True, DIRECT, 4),
        (8, None, False, DIRECT, 6),
        (10, None, True, DIRECT, 10),
        (12, None, True, CURVE, 12),
        (12, None, False, DIRECT, 66),
        (12, 8, True, RANKED, 12),
        (12, 8, False, RANKED, 14),
        (4, 2, True, DIRECT, 4),
    ],
)
def test_the_cheapest_way(bits, level_bits, narrow, way, cycles):
    values = Values(bits, level_bits)
    assert (values.way(narrow), values.cycles(narrow)) == (way, cycles)


@pytest.mark.parametrize("bits", [9, 11, 12])
def test_the_curve_is_closer_than_bfloat16(bits, monkeypatch):
    monkeypatch.setattr(Values, "way", lambda *_: CURVE)
    values, tensor = Values(bits, None), random_trellis(8, 8, bits, 16)
    windows = jnp.asarray(np.arange(2**bits, dtype=np.int32).reshape(-1, 128))
    windows = jnp.pad(windows, ((0, -len(windows) % 16), (0, 0)))

    def kernel(windows_ref, table_ref, out_ref):
        out_ref[...] = values.read(windows_ref[...], table_ref, narrow=True)

    shape = jax.ShapeDtypeStruct(windows.shape, jnp.bfloat16)
    table = jnp.asarray(values._tables(tensor, narrow=True))
    found = jax.jit(pl.pallas_call(kernel, shape, interpret=True))(windows, table)
    # Rows of both halves come in turn.
    found = np.asarray(found, np.float64).reshape(-1, 2, 128).swapaxes(0, 1).reshape(-1)[: 2**bits]
    exact = gaussian_values(bits).astype(np.float64)
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
    assert np.std(found - exact) < 1.03 * np.std(rounded - exact)
    assert np.max(np.abs(found - exact)) < 1e-2  # half a step of bfloat16 from 2 up is 8e-3


# Streams of several to a program, of sublanes that are filled up, and of more than one register.
@pytest.mark.parametrize(
    ("rows", "stream_rows", "tile"),
    [(120, 40, (3, 8)), (128, 32, (4, 8)), pytest.param(600, 288, (3, 32), marks=pytest.mark.slow)],
)
def test_layouts(rows, stream_rows, tile):
    tensor = of_rates(random_trellis(rows, 24, 7, stream_rows), [2] * 20 + [0, 2, 0, 0])
    layout = trellis.pack(tensor).layout
    assert (layout.tile_streams, layout.tile_chunks) == tile
    assert layout.runs == ((2, 1),)
    assert error(tensor, jnp.float32) < 1e-5


def test_many_columns_of_one_rate():
    tensor = of_rates(random_trellis(32, 300, 8, 32, outliers=0), [1] * 300)
    assert trellis.pack(tensor).layout.runs == ((1, 3),)
    assert error(tensor, jnp.bfloat16, batch=1) < 5e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_learned_levels_behind_long_windows(dtype):
    tensor = of_rates(random_trellis(32, 16, 12, 32, level_bits=5), [3] * 16)
    assert Values.of(tensor).way(dtype == jnp.bfloat16) == RANKED
    assert error(tensor, dtype) < (5e-3 if dtype == jnp.bfloat16 else 1e-5)


def test_columns_without_codes_leave_their_outliers():
    tensor = of_rates(random_trellis(16, 10), [0] * 10)
    assert trellis.pack(tensor).layout.blocks == 0
    assert error(tensor, jnp.float32) < 1e-6


def test_no_rows():
    packed = trellis.pack(of_rates(random_trellis(32, 16, 8, 32), [1] * 16))
    assert trellis.matmul(jnp.zeros((0, 16)), packed, interpret=True).shape == (0, 32)


def test_stays_packed():
    tensor = trellis_tensor(8)
    packed = trellis.pack(tensor)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
    # Of 4096 columns five blocks of 128 are half padding, of six rates.
    assert num_bytes <= 1.1 * tensor.num_bytes


def test_what_does_not_fit_is_refused():
    with pytest.raises(NotImplementedError, match="13 bits would take 64 lookups.*at most 12"):
        trellis.check(random_trellis(16, 4, 13))
    long = dataclasses.replace(random_trellis(8, 4, 12), rows=2**20, stream_rows=2**20)
    with pytest.raises(NotImplementedError, match="rows take .* MiB of VMEM and 3"):
        trellis.check(of_rates(long, [2] * 4))
