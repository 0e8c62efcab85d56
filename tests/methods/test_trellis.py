"""The trellis method on layers: budgets, errors, odd shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.check_tensor import check_tensor, check_values
from gptvq_jax.core.hessian import factorize
from gptvq_jax.core.metrics import relative_error
from gptvq_jax.methods import gptvq
from gptvq_jax.methods.layer import Objective, quantize_layer
from gptvq_jax.methods.trellis import TrellisSettings, choose_rates, fixed_bytes, quantize
from gptvq_jax.ops.cpu import viterbi as cpu_viterbi

SMALL = dict(window_bits=6, stream_rows=32, block_size=16)


def layer(rows=64, cols=40, seed=0):
    rng = np.random.default_rng(seed)
    scales = rng.lognormal(0, 0.5, (rows, 1)) * rng.lognormal(0, 0.7, cols)
    weight = (0.02 * rng.normal(size=(rows, cols)) * scales).astype(np.float32)
    inputs = rng.normal(size=(4 * cols, cols)) @ rng.normal(size=(cols, cols))
    inputs *= rng.lognormal(0, 0.7, cols)
    return jnp.asarray(weight), jnp.asarray(inputs.T @ inputs / len(inputs), jnp.float32)


def coded(weight, hessian, **fields):
    objective = Objective(hessian, factorize(hessian, 0.01))
    settings = TrellisSettings(**{**SMALL, **fields})
    return quantize_layer(quantize, settings, weight, [objective], jax.random.key(0))


def error(tensor, weight, hessian):
    check_tensor(tensor)
    check_values(jax.tree.map(np.asarray, tensor))
    return float(relative_error(weight, tensor.dequantize(), hessian))


def test_a_budget_is_met_from_below():
    weight, hessian = layer()
    for bits in (1.5, 2.0, 2.77, 4.0):
        tensor = coded(weight, hessian, bits=bits)
        assert bits - 1 / 40 - 0.001 < tensor.bits_per_value <= bits


def test_more_bits_and_more_memory_and_more_passes_mean_less_error():
    weight, hessian = layer()
    of_bits = [error(coded(weight, hessian, bits=b), weight, hessian) for b in (1.5, 2.5, 3.5)]
    assert of_bits[0] > 3 * of_bits[1] > 9 * of_bits[2] > 0
    of_memory = [
        error(coded(weight, hessian, bits=2.5, window_bits=L), weight, hessian) for L in (4, 9)
    ]
    assert of_memory[0] > 1.1 * of_memory[1]
    of_passes = [
        error(coded(weight, hessian, bits=2.5, recode_passes=n), weight, hessian) for n in (0, 2)
    ]
    assert of_passes[0] > 1.005 * of_passes[1]


def test_rates_for_columns_and_outliers_pay():
    weight, hessian = layer(seed=1)
    rates = [
        error(coded(weight, hessian, bits=2.8, column_rates=r), weight, hessian) for r in (0, 1)
    ]
    assert rates[0] > 1.5 * rates[1]
    spiked = weight.at[3, 5].mul(60 / jnp.abs(weight[3, 5]) * jnp.std(weight))
    kept = [coded(spiked, hessian, bits=2.8, outlier_limit=n) for n in (0.0, 4.5)]
    assert kept[0].outlier_gaps is None and len(kept[1].outlier_gaps) >= 1
    without, with_it = (error(t, spiked, hessian) for t in kept)
    assert without > 1.2 * with_it
    at = kept[1].dequantize()[3, 5]
    assert abs(at - spiked[3, 5]) < 0.05 * abs(spiked[3, 5])


def test_it_beats_codebooks_at_equal_bits():
    weight, hessian = layer(128, 64, seed=2)
    objective = Objective(hessian, factorize(hessian, 0.01))
    settings = gptvq.GPTVQSettings(dim=2, bits=2.0, group_size=2048)
    key = jax.random.key(0)
    books = quantize_layer(gptvq.quantize, settings, weight, [objective], key)
    tensor = coded(weight, hessian, bits=books.bits_per_value, window_bits=8, stream_rows=128)
    assert tensor.bits_per_value <= books.bits_per_value
    assert error(tensor, weight, hessian) < 0.8 * error(books, weight, hessian)


@pytest.mark.parametrize(("rows", "cols"), [(37, 17), (21, 60)])
def test_odd_shapes(rows, cols):
    weight, hessian = layer(rows, cols)
    tensor = coded(weight, hessian, bits=6.0, stream_rows=16)
    assert tensor.shape == (rows, cols)
    assert error(tensor, weight, hessian) < 0.3


def test_zero_rows_and_columns_and_dead_inputs():
    weight, hessian = layer()
    weight = weight.at[3].set(0).at[:, 4].set(0)
    hessian = hessian.at[7].set(0).at[:, 7].set(0)
    tensor = coded(weight, hessian, bits=3.0)
    assert error(tensor, weight, hessian) < 0.1
    quantized = np.asarray(tensor.dequantize())
    assert not np.any(quantized[:, [4, 7]])
    rates = np.asarray(tensor.column_rates())
    assert rates[4] == rates[7] == 0
    nothing = coded(jnp.zeros_like(weight), hessian, bits=3.0)
    assert not np.any(nothing.dequantize())


@pytest.mark.parametrize("unit", [2.0**-30, 2.0**40])
def test_the_unit_of_the_hessian_changes_nothing(unit):
    weight, hessian = layer()
    tensors = coded(weight, hessian), coded(weight, hessian * unit)
    for a, b in zip(*map(jax.tree.leaves, tensors), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not cpu_viterbi.available(), reason="no C++ compiler, or no CPU")
def test_the_kernel_and_the_program_make_layers_alike(monkeypatch):
    weight, hessian = layer()
    native = error(coded(weight, hessian, bits=2.5), weight, hessian)
    monkeypatch.setattr(cpu_viterbi, "available", lambda: False)
    assert error(coded(weight, hessian, bits=2.5), weight, hessian) == pytest.approx(
        native, rel=0.03
    )


def test_a_budget_below_its_own_scales_is_refused():
    weight, hessian = layer()
    least = 8 * fixed_bytes(64, 40) / (64 * 40)
    with pytest.raises(ValueError, match=f"trellis.bits=0.5 is below .* at least {least:.3f}"):
        coded(weight, hessian, bits=0.5)
    rates = choose_rates(np.ones(40), 0, (64, 40), TrellisSettings(**SMALL, bits=6.0))
    assert rates.max() <= 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0.0}, "trellis.bits=0.0 must be above 0"),
        ({"bits": 7.0}, "trellis.bits=7.0"),
        ({"window_bits": 3}, "trellis.window_bits=3 must be 4 to 16"),
        ({"window_bits": 17}, "trellis.window_bits=17"),
        ({"stream_rows": 8}, "trellis.stream_rows=8 must be at least window_bits"),
        ({"outlier_limit": 1.0}, "trellis.outlier_limit=1.0 must be 0, or 2 up"),
        ({"recode_passes": -1}, "trellis.recode_passes=-1"),
        ({"block_size": 0}, "trellis.block_size=0"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        TrellisSettings(**fields)


def test_other_budgets_and_passes_compile_nothing_anew():
    weight, hessian = layer()
    coded(weight, hessian, bits=2.5, recode_passes=1)
    from gptvq_jax.methods import trellis

    compiled = trellis._code._cache_size(), trellis.demand._cache_size()
    coded(weight, hessian, bits=3.5, recode_passes=2)
    assert (trellis._code._cache_size(), trellis.demand._cache_size()) == compiled
