"""FLOP of whole layers: what the settings say against the traced programs."""

import jax
import jax.numpy as jnp
import pytest
from jaxpr_flops import count

from gptvq_jax.core import flops
from gptvq_jax.core.hessian import Factor
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.methods.layer import Objective, Problem, most_flops
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.uniform import UniformSettings

pytestmark = pytest.mark.usefixtures("short_programs")

ROWS, COLS, ROUNDS = 96, 768, 3
GPTVQ = dict(em_iterations=ROUNDS, update_iterations=ROUNDS, polish_rounds=ROUNDS)
# Adam takes a step more than it says, and every loop of a traced count is run ROUNDS times.
ADAM = {**GPTVQ, "update_iterations": ROUNDS - 1, "codebook_update": "adam"}
AQLM = dict(code_bits=4, em_iterations=1, rounds=1)  # its last update is a loop of one trip

CASES = {
    "gptvq": ("gptvq", GPTVQSettings(**GPTVQ), ROUNDS),
    "scales": ("gptvq", GPTVQSettings(**GPTVQ, scale_block_size=16), ROUNDS),
    "no update": ("gptvq", GPTVQSettings(**GPTVQ, codebook_update="none"), ROUNDS),
    "adam": ("gptvq", GPTVQSettings(**ADAM), ROUNDS),
    "svd": ("gptvq", GPTVQSettings(**ADAM, dim=1, svd_rank=2), ROUNDS),
    "rows": ("gptvq", GPTVQSettings(**GPTVQ, row_scales=True, beam=3), ROUNDS),
    "aqlm": ("aqlm", AQLMSettings(**AQLM), 1),
    "beam": ("aqlm", AQLMSettings(**AQLM, beam=3, update_iterations=7), 1),
    "aqlm adam": (
        "aqlm",
        AQLMSettings(**AQLM, start="residual", seed="random", codebook_update="adam"),
        1,
    ),
    "gptq": ("gptq", UniformSettings(), 1),
    "rtn": ("rtn", UniformSettings(), 1),
}


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("method, settings, trips", CASES.values(), ids=CASES)
def test_of_a_layer(method, settings, trips):
    key = jax.eval_shape(lambda: jax.random.key(0))
    arrays = floats(ROWS, COLS), floats(COLS, COLS), floats(COLS, COLS), key
    quantize = METHODS[method].quantize
    counted = count(lambda *a: quantize(*a, settings), *arrays, trips=trips)
    # Beside products with C x C matrices there are those of vectors: D x D, and of codebooks.
    assert settings.flops(ROWS, COLS) < counted < 1.02 * settings.flops(ROWS, COLS)


def test_of_polish_that_other_inputs_judge():
    key = jax.eval_shape(lambda: jax.random.key(0))
    square = floats(COLS, COLS)
    settings = GPTVQSettings(**GPTVQ, polish_judge="held_out")
    quantize = METHODS["gptvq"].quantize
    arrays = floats(ROWS, COLS), square, square, key, square
    judged = lambda *a: quantize(*a[:4], settings, judge=a[4])  # noqa: E731
    counted = count(judged, *arrays, trips=ROUNDS)
    assert settings.flops(ROWS, COLS) < counted < 1.02 * settings.flops(ROWS, COLS)
    plain = GPTVQSettings(**GPTVQ).flops(ROWS, COLS)
    assert settings.flops(ROWS, COLS) - plain == (ROUNDS + 1) * flops.unit(ROWS, COLS)


def test_of_row_groups_and_their_shifts():
    settings = CASES["gptvq"][1]
    objective = Objective(floats(COLS, COLS), Factor(floats(COLS, COLS), 0.01))
    arguments = METHODS["gptvq"].quantize, settings, floats(ROWS, COLS)
    groups = 3 * settings.flops(ROWS // 3, COLS)
    assert most_flops(Problem(*arguments, [objective] * 3, None)) == groups
    shifted = objective._replace(shift=floats(ROWS // 3, COLS))
    expected = groups + 3 * flops.unit(ROWS, COLS)  # the shift, and two for the target
    assert most_flops(Problem(*arguments, [shifted] * 3, None)) == expected
