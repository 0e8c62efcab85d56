"""The C++ products with trellis codes beyond base.py: every L, and how they are packed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base import relative_error, tensor_of
from float64 import decode
from test_cpu import needs_compiler

from gptvq_jax.core.trellis_table import gaussian_values, ranks
from gptvq_jax.ops.cpu.trellis_layout import SLACK, arrange_outliers, arrange_streams
from gptvq_jax.ops.cpu.trellis_parts import level_parts
from gptvq_jax.ops.vq_matmul import make_kernel, vq_matmul
from gptvq_jax.study.sample_tensors import TrellisFormat, random_trellis


@needs_compiler
@pytest.mark.parametrize("bits, levels", [(bits, 0) for bits in range(4, 17)] + [(11, 3)])
def test_every_width_of_a_window(bits, levels):
    tensor = random_trellis(70, 45, bits, max(bits, 27), level_bits=levels)
    assert set(np.asarray(tensor.column_rates())) == set(range(min(bits, 6) + 1))
    x = np.random.default_rng(bits).normal(size=(5, 45)).astype(np.float32)
    expected = x.astype(np.float64) @ decode(tensor).T
    for name, tolerance in (("cpu", 1e-6), ("cpu_int8", 1e-2)):
        kernel = make_kernel(jax.tree.map(jnp.asarray, tensor), name)
        many = jnp.asarray(x) @ kernel
        assert relative_error(many, expected) < tolerance
        one = jnp.concatenate([jnp.asarray(row[None]) @ kernel for row in x])
        np.testing.assert_allclose(many, one, rtol=2e-5, atol=1e-6)


@needs_compiler
def test_few_rows_and_many_columns_are_shared_by_columns():
    tensor = TrellisFormat(2, window_bits=8).random(64, 2048)
    x = np.random.default_rng(0).normal(size=(1, 2048)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(tensor.dequantize(), np.float64).T
    for name, tolerance in (("cpu", 1e-5), ("cpu_int8", 1e-2)):
        y = vq_matmul(jnp.asarray(x), jax.tree.map(jnp.asarray, tensor), implementation=name)
        assert relative_error(y, expected) < tolerance


@needs_compiler
def test_under_jit_another_implementation_is_chosen_or_asked_for():
    tensor, x = tensor_of("trellis, 8 bits"), jnp.ones((1, 96))
    y = jax.jit(vq_matmul)(x, tensor)
    assert relative_error(y, np.ones((1, 96)) @ decode(tensor).T) < 1e-5
    with pytest.raises(NotImplementedError, match="make the kernel outside of jax.jit"):
        jax.jit(lambda x, t: vq_matmul(x, t, implementation="cpu"))(x, tensor)


@needs_compiler
def test_packed_streams_have_two_bytes_more_than_stored_ones():
    tensor = TrellisFormat(2).random(512, 64)
    kernel = make_kernel(jax.tree.map(jnp.asarray, tensor), "cpu_int8")
    streams = len(np.asarray(tensor.column_rates())) * tensor.cuts
    padding = kernel.packed.codes.size - tensor.codes.size - 2 * streams - SLACK
    assert 0 <= padding <= 9 * tensor.cuts * (256 * 3 // 8 + 2)  # fours that are not full


def test_a_stream_goes_on_with_its_beginning():
    tensor = random_trellis(31, 43, window_bits=12, stream_rows=13)  # ends within a byte
    streams = arrange_streams(tensor)
    windows = np.asarray(tensor.windows())
    rates = np.asarray(tensor.column_rates())
    at = 0
    for cut in range(tensor.cuts):
        for rate in range(1, 7):
            size = -(-(13 * rate + 12 - rate) // 8)
            first = 4 * int(streams.rate_quads[:rate].sum())
            for slot in range(first, first + 4 * streams.rate_quads[rate]):
                bits = int.from_bytes(streams.codes[at : at + size].tobytes(), "little")
                at += size
                if not streams.filled[slot]:
                    assert bits == 0
                    continue
                assert rates[streams.order[slot]] == rate
                for r in range(13 * cut, min(31, 13 * cut + 13)):
                    window = bits >> (r - 13 * cut) * rate & 2**12 - 1
                    assert window == windows[r, streams.order[slot]]
    assert at + SLACK == len(streams.codes)
    kept = np.sort(streams.order[streams.filled])
    np.testing.assert_array_equal(kept, np.nonzero(rates)[0])


def test_outliers_are_sorted_by_cut():
    tensor = random_trellis(64, 30, outliers=40)
    outliers = arrange_outliers(tensor)
    for cut in range(tensor.cuts):
        some = slice(*outliers.starts[cut : cut + 2])
        assert np.all(outliers.rows[some] // tensor.stream_rows == cut)
    assert outliers.starts[-1] == 40 == len(outliers.values)
    added = np.zeros((64, 30), np.float32)
    np.add.at(added, (outliers.rows, outliers.cols), outliers.values)
    without = dataclasses.replace(tensor, outlier_gaps=None, outlier_values=None)
    np.testing.assert_allclose(tensor.dequantize() - without.dequantize(), added, atol=1e-7)


@pytest.mark.parametrize("bits", [9, 10, 11, 12])
def test_levels_are_worked_out_from_parts(bits):
    parts, unit = level_parts(bits, bias=128)
    low, high, rest, level, slope, added = np.split(
        parts.astype(np.int64), np.cumsum([256, 64, 64, 128, 128])
    )
    windows, last = np.arange(2**bits), 2 ** (bits - 8) - 1
    top = windows >> (bits - 4)
    rank, more = low[windows & 255] ^ high[top], rest[top]
    np.testing.assert_array_equal(rank << (bits - 8) | more, ranks(bits))
    upper = rank >= 128
    at, more = np.where(upper, rank - 128, 127 - rank), np.where(upper, more, last - more)
    value = level[at] - 128 + parts.astype(np.int8)[640 + (slope[at] | more)]
    assert value.max() == 127
    error = np.where(upper, value, -value) * unit - gaussian_values(bits)
    assert np.sqrt(np.mean(error**2)) < 0.009  # of rounding alone, 0.0083 at 12 bits
    assert np.abs(error).max() < 1.2 * unit
