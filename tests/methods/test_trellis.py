"""The trellis method on layers: budgets, errors, odd shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpr_flops import count

from gptvq_jax.core.check_tensor import check_tensor, check_values
from gptvq_jax.core.hessian import factorize
from gptvq_jax.core.metrics import relative_error
from gptvq_jax.core.row_axis import ALL_HERE
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.methods import gptvq, trellis, trellis_budget
from gptvq_jax.methods.layer import Objective, quantize_layer
from gptvq_jax.methods.trellis import TrellisSettings, quantize
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
    kept = [coded(spiked, hessian, bits=2.8, outlier_limit=n) for n in ("0", "4.5")]
    assert kept[0].outlier_gaps is None and len(kept[1].outlier_gaps) >= 1
    without, with_it = (error(t, spiked, hessian) for t in kept)
    assert without > 1.2 * with_it
    at = kept[1].dequantize()[3, 5]
    assert abs(at - spiked[3, 5]) < 0.05 * abs(spiked[3, 5])


def test_outliers_are_kept_where_they_are_worth_it():
    weight, hessian = layer(128, 48, seed=3)
    tails = np.random.default_rng(3).standard_t(3, size=weight.shape)
    heavy = jnp.asarray(0.02 * tails, jnp.float32)
    fields = dict(bits=3.2, stream_rows=64, window_bits=8)
    limits = ("0", "2", "3", "4.5", "8")
    fixed = [
        error(coded(heavy, hessian, **fields, outlier_limit=n), heavy, hessian) for n in limits
    ]
    tensor = coded(heavy, hessian, **fields)
    assert TrellisSettings().outlier_limit == "auto" and tensor.bits_per_value <= 3.2
    assert error(tensor, heavy, hessian) < 1.03 * min(fixed)
    assert min(fixed) < 0.9 * fixed[0]
    # A weight that no input reads is worth nothing; where bits are scarce, less is.
    unread = hessian.at[5].set(0).at[:, 5].set(0)
    tensor = coded(heavy.at[9, 5].set(3.0), unread, **fields)
    assert 5 not in np.asarray(tensor.outlier_positions()[1])


def test_more_outliers_than_a_limit_leave_the_codes_their_bits():
    weight, hessian = layer(128, 48)
    wild = jnp.asarray(0.001 * np.random.default_rng(0).standard_cauchy(weight.shape), jnp.float32)
    for limit in ("auto", "2"):
        settings = TrellisSettings(**SMALL, bits=2.5, outlier_limit=limit)
        tensor = coded(wild, hessian, bits=2.5, outlier_limit=limit, form="codes")
        assert len(tensor.outlier_gaps) == settings.most_outliers(128, 48) == 61
        assert 2.4 < tensor.bits_per_value <= 2.5
        error(tensor, wild, hessian)
    # Those that stand out most.
    settings = TrellisSettings(**SMALL, bits=2.5, outlier_limit="2")
    chol = factorize(hessian, 0.01).hinv_chol
    some, more = (trellis_budget.demand(wild, chol, settings, n) for n in (10, 1000))
    assert np.sum(some.outliers) == 10 and np.sum(more.outliers) > 61
    assert np.all(np.asarray(more.outliers)[np.asarray(some.outliers)])
    # With one rate for all columns, outliers take what is left beyond a whole bit.
    same = coded(wild, hessian, bits=2.7, column_rates=False, form="codes")
    assert np.all(np.asarray(same.column_rates()) == 2) and len(same.outlier_gaps) > 0


def test_a_layer_of_too_many_outliers_is_kept_in_8_bits_and_said(caplog):
    weight, hessian = layer(128, 48)
    objective = Objective(hessian, factorize(hessian, 0.01))
    # Of 6144 weights 61 may be outliers; Gaussian ones have next to none.
    places = np.random.default_rng(0).permutation(weight.size)
    tensors = {}
    for kept in (40, 150):
        at = np.unravel_index(places[:kept], weight.shape)
        spiked = weight.at[at].set(5.0)
        settings = TrellisSettings(**SMALL, bits=2.5)
        problem = (quantize, settings, spiked, [objective], jax.random.key(0))
        tensors[kept] = quantize_layer(*problem, name="layer 7")
        assert ("layer 7" in caplog.text) == (kept == 150)
    assert isinstance(tensors[40], TrellisTensor) and tensors[40].bits_per_value <= 2.5
    kept = tensors[150]
    assert isinstance(kept, VQTensor) and kept.index_bits == 8
    assert kept.num_bytes == settings.int8.bytes(128, 48)
    assert f"it is kept in 8 bits, {kept.bits_per_value:.3f} bits per value" in caplog.text
    codes, own = (coded(spiked, hessian, bits=2.5, form=form) for form in ("codes", "int8"))
    assert isinstance(codes, TrellisTensor)
    assert error(kept, spiked, hessian) < 0.1 * error(codes, spiked, hessian)
    # A layer whose form is named is that, and so is one without outliers.
    assert np.array_equal(own.codes, kept.codes) and own.num_bytes == kept.num_bytes
    assert isinstance(coded(spiked, hessian, bits=2.5, outlier_limit="0"), TrellisTensor)
    assert coded(weight, hessian, form="int8").index_bits == 8


@pytest.mark.slow
def test_fitted_levels_pay_where_weights_are_no_gaussian_and_count_as_bits():
    weight, hessian = layer(128, 64, seed=4)
    weight = jnp.sign(weight) * (0.1 + 0.1 * weight)  # nearly two values
    made = [coded(weight, hessian, bits=2.5, levels=n) for n in ("gaussian", "16")]
    assert made[0].levels is None and made[1].levels.shape == (16,)
    assert made[1].levels.dtype == jnp.float16
    assert all(2.4 < tensor.bits_per_value <= 2.5 for tensor in made)
    errors = [error(tensor, weight, hessian) for tensor in made]
    assert errors[1] < 0.7 * errors[0]
    sizes = [TrellisSettings(levels=n).fixed_bytes(128, 64) for n in ("gaussian", "16")]
    assert sizes[1] - sizes[0] == 32


@pytest.mark.parametrize("levels", ["gaussian", "16"])
def test_flops_are_those_of_the_program(levels):
    rows, cols, passes = 64, 512, 2
    settings = TrellisSettings(**SMALL, levels=levels, recode_passes=passes)
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    weight, square = floats(rows, cols), floats(cols, cols)
    of_layer = jax.eval_shape(trellis_budget._beyond, weight, square, floats())
    rates = jax.ShapeDtypeStruct((cols,), jnp.int32)
    own = weight, of_layer.outliers, of_layer.row_scales, floats(rows)
    shared = square, square, rates, jax.ShapeDtypeStruct((), jnp.int32)
    static = trellis._shape_of(settings), settings.rows_of_stream(rows), "jax", ALL_HERE
    counted = count(lambda *a: trellis._code(*a, *static), *own, *shared, trips=passes)
    assert settings.flops(rows, cols) <= counted < 1.002 * settings.flops(rows, cols)


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


def test_rows_fewer_than_a_window_have_one_stream():
    weight, hessian = layer(5, 40)
    tensor = coded(weight, hessian, bits=6.0, window_bits=8, stream_rows=256)
    assert tensor.stream_rows == 8 and tensor.cuts == 1
    assert error(tensor, weight, hessian) < 0.5
    # A column has no more bits a weight than a window.
    tensor = coded(*layer(256, 8), bits=6.0, window_bits=4)
    assert np.max(tensor.column_rates()) == TrellisSettings(window_bits=4).most_rate == 4


def test_a_layer_is_named_where_it_has_too_many_outliers_or_no_budget(caplog):
    weight, hessian = layer(128, 48)
    objective = Objective(hessian, factorize(hessian, 0.01))

    def made(weight, bits):
        settings = TrellisSettings(**SMALL, bits=bits, outlier_limit="3")
        key = jax.random.key(0)
        return quantize_layer(quantize, settings, weight, [objective], key, name="layer 7")

    made(weight, 2.5)
    assert not caplog.records
    made(jnp.asarray(np.random.default_rng(0).standard_cauchy((128, 48)) / 99, jnp.float32), 2.5)
    assert "layer 7 has more outliers than the 61 that are kept beside codes" in caplog.text
    with pytest.raises(ValueError, match="^layer 7: trellis.bits=0.4 is below .* set at least 0.4"):
        made(weight, 0.4)


def test_a_budget_below_its_own_scales_is_refused():
    weight, hessian = layer()
    least = 8 * TrellisSettings().fixed_bytes(64, 40) / (64 * 40)
    with pytest.raises(ValueError, match=f"trellis.bits=0.5 is below .* at least {least:.3f}"):
        coded(weight, hessian, bits=0.5)
    assert coded(weight, hessian, bits=least + 0.001).bits_per_value <= least + 0.001


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0.0}, "trellis.bits=0.0 must be above 0"),
        ({"bits": 7.0}, "trellis.bits=7.0"),
        ({"window_bits": 3}, "trellis.window_bits=3 must be 4 to 16"),
        ({"window_bits": 17}, "trellis.window_bits=17"),
        ({"stream_rows": 8}, "trellis.stream_rows=8 must be at least window_bits=12"),
        ({"outlier_limit": "1.0"}, "trellis.outlier_limit='1.0' must be 'auto', 0, or 2 up"),
        ({"form": "int4"}, "trellis.form='int4' must be 'auto', 'codes' or 'int8'"),
        ({"outlier_limit": "some"}, "trellis.outlier_limit='some' must be 'auto', 0, or 2 up"),
        ({"outlier_limit": "nan"}, "trellis.outlier_limit='nan' must be"),
        (
            {"levels": "some"},
            "trellis.levels='some' must be 'gaussian', or a power of two from 2 to",
        ),
        ({"levels": "24"}, "trellis.levels='24' must be"),
        ({"levels": "128", "window_bits": 6}, "trellis.levels='128' must be .* 2.window_bits=64"),
        ({"levels": "0"}, "trellis.levels='0' must be"),
        ({"levels": "1"}, "trellis.levels='1' must be"),
        ({"levels": "8", "recode_passes": 0}, "recode_passes=0 must be at least 1 with fitted"),
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
    programs = trellis._code, trellis_budget._beyond, trellis_budget._of, trellis_budget._losses
    compiled = [program._cache_size() for program in programs]
    coded(weight, hessian, bits=3.5, recode_passes=2)
    coded(weight, hessian, bits=3.5, outlier_limit="6")
    assert [program._cache_size() for program in programs] == compiled
