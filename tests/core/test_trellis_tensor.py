"""The trellis-coded tensor: streams, outliers, table and bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import decode

from gptvq_jax.core.code_usage import code_metrics
from gptvq_jax.core.quantized_tensor import dequantize_compiled
from gptvq_jax.core.trellis_table import gaussian_values, rank_parts, ranks
from gptvq_jax.core.trellis_tensor import (
    count_outliers,
    pack_outliers,
    pack_streams,
    unpack_streams,
)
from gptvq_jax.study.sample_tensors import random_trellis


@pytest.mark.parametrize("stream_rows", [8, 13, 24])
@pytest.mark.parametrize("cols", [1, 9, 40])
def test_pack_and_unpack_are_inverse_for_mixed_rates(stream_rows, cols):
    rng = np.random.default_rng(cols)
    rates = rng.integers(0, 7, cols)
    codes = rng.integers(0, 64, (3, stream_rows, cols)) & (2**rates - 1)
    stored = pack_streams(codes, rates)
    needed = 3 * sum(-(-stream_rows * rate // 8) for rate in rates)
    assert stored.dtype == np.uint8 and len(stored) == max(1, needed)
    unpacked = unpack_streams(jnp.asarray(stored), jnp.asarray(rates), 3, stream_rows)
    np.testing.assert_array_equal(unpacked, codes)
    longer = np.concatenate([stored, rng.integers(0, 256, 20).astype(np.uint8)])
    unpacked = unpack_streams(jnp.asarray(longer), jnp.asarray(rates), 3, stream_rows)
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("places", [[0], [7, 8], [65535], [65536], [131070, 131071, 400000]])
def test_outliers_of_any_gap_come_back(places):
    values = np.arange(1, len(places) + 1)
    gaps, stored = pack_outliers(np.array(places), values)
    assert gaps.dtype == np.uint16 and stored.dtype == np.float16
    assert len(gaps) == count_outliers(np.array(places))
    at = np.cumsum(gaps, dtype=np.int64)
    assert at[stored != 0].tolist() == places
    assert stored[stored != 0].tolist() == values.tolist()
    assert len(gaps) - len(places) == sum(max(0, g - 1) // 65535 for g in np.diff([0, *places]))


def test_no_outliers():
    gaps, stored = pack_outliers(np.zeros(0, int), np.zeros(0))
    assert len(gaps) == len(stored) == 0


@pytest.mark.parametrize("outliers", [0, 5])
@pytest.mark.parametrize("level_bits", [0, 3])
def test_dequantize_is_the_definition_and_padding_changes_nothing(outliers, level_bits):
    tensor = random_trellis(30, 21, 7, 11, outliers, level_bits, seed=3)
    expected = decode(tensor)
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=1e-5, atol=1e-7)
    padded = tensor.for_compilation()
    assert len(padded.codes) > len(tensor.codes)
    np.testing.assert_array_equal(padded.dequantize(), tensor.dequantize())
    np.testing.assert_allclose(dequantize_compiled(tensor), expected, rtol=1e-5, atol=1e-7)


def test_tensors_of_one_shape_share_their_programs():
    few, many = (random_trellis(64, 40, 7, 16, n, seed=n).for_compilation() for n in (0, 4))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tensor) for tensor in (few, many)]
    assert shapes[0] == shapes[1]


def test_bits_are_those_of_every_array():
    tensor = random_trellis(32, 20, 8, 16, outliers=4)
    rates = np.asarray(tensor.column_rates())
    needed = 32 * rates.sum() + 4 * 20 + 16 * 32 + 16 * 20 + 32 * 4
    assert tensor.bits_per_value == needed / (32 * 20)


def test_a_column_of_rate_0_is_zero_but_for_outliers():
    tensor = random_trellis(16, 30, 6, 16, outliers=0)
    rates = np.asarray(tensor.column_rates())
    weight = np.asarray(tensor.dequantize())
    assert np.array_equal(np.all(weight == 0, axis=0), rates == 0) and np.any(rates == 0)
    one = dataclasses.replace(
        tensor, outlier_gaps=np.array([16 * int(np.argmin(rates)) + 3], np.uint16),
        outlier_values=np.array([0.5], np.float16),
    )  # fmt: skip
    changed = np.asarray(one.dequantize()) - weight
    assert changed[3, np.argmin(rates)] == 0.5 and np.count_nonzero(changed) == 1


@pytest.mark.parametrize("bits", [4, 5, 8, 12, 16])
def test_the_table_is_a_gaussian_behind_a_permutation(bits):
    assert sorted(ranks(bits)) == list(range(2**bits))
    values = gaussian_values(bits)
    assert np.std(values) == pytest.approx(1, abs=1e-3) and np.mean(values) == pytest.approx(
        0, abs=1e-3
    )
    assert np.all(np.diff(values[np.argsort(ranks(bits))]) >= 0)


@pytest.mark.parametrize("bits", [6, 12])
@pytest.mark.parametrize("rate", [1, 2, 3])
def test_choices_are_spread_over_the_table(bits, rate):
    """A weight's 2^K windows, given the others' bits, lie one in each part of equal size."""
    parts = ranks(bits).reshape(-1, 2**rate) >> (bits - rate)
    assert np.all(np.sort(parts, axis=1) == np.arange(2**rate))


@pytest.mark.parametrize("bits", [4, 7, 12, 16])
def test_ranks_are_of_two_parts(bits):
    (low, high, split), windows = rank_parts(bits), np.arange(2**bits)
    assert (len(low), len(high)) == (2 ** (split - 1), 2 ** (bits - split))
    rank = low[windows % 2**split >> 1] ^ high[windows >> split] ^ windows % 2 << (bits - 1)
    np.testing.assert_array_equal(rank, ranks(bits))


def test_the_table_is_a_stored_format():
    """Another one would change what every file means: raise TABLE_VERSION."""
    assert ranks(8)[:8].tolist() == [173, 45, 237, 109, 13, 141, 77, 205]
    assert gaussian_values(8)[:4].tolist() == [
        0.462646484375,
        -0.92626953125,
        1.462890625,
        -0.1826171875,
    ]


def test_entropy_of_windows():
    tensor = random_trellis(256, 64, 4, 16, outliers=0, seed=1)
    metrics = code_metrics(jax.tree.map(jnp.asarray, tensor))
    assert 3.9 < metrics["code_entropy"] <= 4 == metrics["index_bits"]
    assert sum(metrics["columns_by_rate"]) == 64 and metrics["outliers"] == 0
    still = dataclasses.replace(tensor, codes=np.zeros_like(tensor.codes))
    assert code_metrics(still)["code_entropy"] == 0
