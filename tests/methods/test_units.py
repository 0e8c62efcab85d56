"""Units change nothing: of the Hessian, of the weight; and what float16 cannot hold is said so."""

import logging

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.hessian import factorize
from gptvq_jax.core.vq_tensor import dequantize
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.methods.layer import Objective, quantize_layer, relative_error
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.uniform import UniformSettings

pytestmark = pytest.mark.usefixtures("short_programs")

ROWS, COLS = 16, 32
GPTVQ = dict(group_size=256, max_group_cols=16, block_size=16, em_iterations=2)
AQLM = dict(num_codebooks=2, code_bits=3, dim=4, em_iterations=2, rounds=2, block_size=16)
# Together every option that has arithmetic of its own.
CASES = {
    "1d svd": (
        "gptvq",
        GPTVQSettings(
            **GPTVQ, dim=1, bits=2.0, seed="cdf", svd_rank=2, polish_rounds=0, update_iterations=3
        ),
    ),
    "4d adam": (
        "gptvq",
        GPTVQSettings(
            **GPTVQ,
            dim=4,
            bits=0.75,
            seed="mahalanobis",
            exact_metric=False,
            codebook_update="adam",
            codebook_bits=4,
            polish_rounds=0,
        ),
    ),
    "2d scales": (
        "gptvq",
        GPTVQSettings(
            **GPTVQ,
            bits=1.5,
            seed="random",
            scale_block_size=8,
            codebook_bits=16,
            polish_rounds=2,
        ),
    ),
    "aqlm": ("aqlm", AQLMSettings(**AQLM, beam=2)),
    "aqlm adam": (
        "aqlm",
        AQLMSettings(**AQLM, start="residual", seed="random", codebook_update="adam"),
    ),
    "gptq": ("gptq", UniformSettings(group_size=8, block_size=16)),
    "rtn": ("rtn", UniformSettings(group_size=8, block_size=16)),
    "rtn symmetric": ("rtn", UniformSettings(group_size=8, block_size=16, symmetric=True)),
}
run_dequantize = jax.jit(dequantize)


def hessian_of(inputs):
    """All inputs as in `ref.problem`; every fifth 'dead', all 'dead', or all the same."""
    hessian = ref.problem(ROWS, COLS).hessian
    live = {"live": np.ones(COLS), "dead": np.arange(COLS) % 5 != 0, "all dead": np.zeros(COLS)}
    if inputs == "constant":
        return np.ones_like(hessian)
    return (hessian * np.outer(live[inputs], live[inputs])).astype(np.float32)


def run(case, inputs="live", of_weight=1.0, of_hessian=1.0, weight=None):
    """The tensor, what it stands for, and its relative error."""
    method, settings = CASES[case]
    if weight is None:
        weight = ref.problem(ROWS, COLS).weight
    weight = jnp.asarray(weight * np.float32(of_weight))
    hessian = jnp.asarray(hessian_of(inputs) * np.float32(of_hessian))
    objective = Objective(hessian, factorize(hessian, 0.01))
    tensor = quantize_layer(
        METHODS[method].quantize, settings, weight, [objective], jax.random.key(0), name="layer 7"
    )
    quantized = run_dequantize(tensor)
    return tensor, np.asarray(quantized), relative_error(weight, quantized, [objective])


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_the_unit_of_the_hessian_changes_no_bit(case):
    for inputs, scales in {
        "live": (2.0, 2.0**-90, 2.0**90),
        "dead": (2.0**-13, 2.0**13),
        "constant": (2.0**-90,),
    }.items():
        tensor, _, error = run(case, inputs)
        assert 0 < error < 0.5
        for scale in scales:
            scaled, _, scaled_error = run(case, inputs, of_hessian=scale)
            assert_same(scaled, tensor)
            assert scaled_error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_weight_has_no_unit_either(case):
    for inputs in ("live", "dead"):
        _, quantized, error = run(case, inputs)
        for scale in (4.0, 2.0**6):  # a square: SVD takes the root of it
            _, scaled, scaled_error = run(case, inputs, of_weight=scale)
            if "scales" in case:  # logarithms in float16, where the unit is added
                assert scaled_error == pytest.approx(error, rel=0.1)
            else:
                np.testing.assert_array_equal(scaled, scale * quantized)


@pytest.mark.parametrize("case", CASES)
def test_without_live_inputs_nothing_is_left_to_lose(case):
    _, quantized, error = run(case, "all dead")
    assert np.isfinite(quantized).all() and error == 0


@pytest.mark.parametrize("case", CASES)
def test_zeros_stay_zeros(case):
    weight = ref.problem(ROWS, COLS).weight
    assert not run(case, weight=0 * weight)[1].any()
    weight[3] = 0
    _, quantized, error = run(case, weight=weight)
    assert 0 < error < 0.5
    if CASES[case][0] in ("gptq", "rtn"):  # rows have grids of their own
        assert not quantized[3].any()


def test_dead_inputs_do_not_change_the_codes_of_the_others():
    """Of a method whose groups the others do not share."""
    weight, hessian = ref.problem(ROWS, COLS)[:2]
    longer = np.zeros((COLS + 8, COLS + 8), np.float32)
    longer[8:, 8:] = hessian
    padded = np.concatenate([np.ones((ROWS, 8), np.float32), weight], 1)
    codes = []
    for w, h in [(weight, hessian), (padded, longer)]:
        objective = Objective(jnp.asarray(h), factorize(jnp.asarray(h), 0.01))
        tensor = quantize_layer(
            METHODS["gptq"].quantize,
            CASES["gptq"][1],
            jnp.asarray(w),
            [objective],
            jax.random.key(0),
        )
        codes.append(np.asarray(tensor.unpack_codes())[0])
    np.testing.assert_array_equal(codes[1][:, 8:], codes[0])


LARGEST = {"1d svd": 1e8, "4d adam": 1e5, "2d scales": 1e14}


@pytest.mark.parametrize("case", CASES)
def test_too_large_for_float16(case):
    error = run(case)[2]
    largest = LARGEST.get(case, 5e3)
    assert run(case, of_weight=largest)[2] < 1.1 * error
    for scale in (1e30, 1e7) if largest < 1e7 else (1e30,):
        message = r"^layer 7 holds .*e\+\d+, too large for float16, .*dense_dtype.*scale_block_size"
        with pytest.raises(ValueError, match=message):
            run(case, of_weight=scale)


def test_a_dead_input_may_be_of_any_size():
    weight = ref.problem(ROWS, COLS).weight
    expected = run("gptq", "dead", weight=weight)[1]
    weight[:, 5] = 1e30  # input 5 is dead
    np.testing.assert_array_equal(run("gptq", "dead", weight=weight)[1], expected)


SMALLEST = {"1d svd": 1e-9, "2d scales": 1e-14}


@pytest.mark.parametrize("case", CASES)
def test_too_small_for_float16(case, caplog):
    error = run(case)[2]
    smallest = SMALLEST.get(case, 2e-6)
    with caplog.at_level(logging.WARNING):
        assert run(case, of_weight=smallest)[2] < 1.5 * error  # few bits are left
        assert not caplog.records
        lost = run(case, of_weight=smallest / 1e4)[2]
    assert np.isfinite(lost) and lost < 1.1
    (record,) = caplog.records
    assert record.getMessage().startswith("layer 7 holds at most ")
    assert "too small for float16" in record.getMessage()


@pytest.mark.parametrize("case", CASES)
def test_one_huge_weight(case):
    weight = ref.problem(ROWS, COLS).weight
    weight[5, 9] = 3e4
    _, quantized, error = run(case, weight=weight)
    assert np.isfinite(quantized).all() and error < 0.5
