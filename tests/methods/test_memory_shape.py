"""No array of rows x cols x K elements is formed: the traced program holds only small ones."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from gptvq_jax.methods import aqlm
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq import GPTVQSettings, quantize

ROWS = COLS = 1024


def largest_array(function, *args) -> tuple[int, str]:
    """Elements and description of the largest array in a traced program, loops included."""

    def outputs(jaxpr):
        for equation in jaxpr.eqns:
            yield from ((v.aval, equation.primitive.name) for v in equation.outvars)
            for param in jax.tree.leaves(list(equation.params.values())):
                if isinstance(param, (ClosedJaxpr, Jaxpr)):
                    yield from outputs(getattr(param, "jaxpr", param))

    return max(
        (aval.size, f"{name}: {aval}")
        for aval, name in outputs(jax.make_jaxpr(function)(*args).jaxpr)
    )


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_the_largest_array_is_found_inside_loops():
    def table(x):  # distances of all pairs, inside two nested loops
        step = lambda carry, _: (carry + jnp.sum(jnp.square(x[:, None] - x)), None)  # noqa: E731
        inner = lambda: jax.lax.scan(step, 0.0, length=3)[0]  # noqa: E731
        return jax.lax.cond(x[0] > 0, inner, lambda: 0.0)

    assert largest_array(table, floats(50))[0] == 50 * 50


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 2, "bits": 4.0},
        {"dim": 4, "bits": 2.0},
        {"dim": 2, "bits": 4.0, "scale_block_size": 16},
        {"dim": 2, "bits": 4.0, "seed": "mahalanobis", "codebook_update": "adam"},
    ],
    ids=str,
)
def test_no_array_of_quantize_grows_with_the_codebook(options):
    settings = GPTVQSettings(**options)
    assert settings.codebook_size == 256
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = floats(ROWS, COLS), floats(COLS, COLS), floats(COLS, COLS), key
    size, what = largest_array(lambda *args: quantize(*args, settings), *args)
    # The widest step packs the codes: one number per bit, 4 bits per weight here. A table of every
    # vector and every centroid would have 64 (4D) or 128 (2D) elements per weight.
    assert size <= 4 * ROWS * COLS, what


ONE_LARGE = {"num_codebooks": 1, "code_bits": 16, "seed": "random"}


@pytest.mark.parametrize(
    "options, most",
    [
        # Numbers for each weight. The codes are packed bit by bit, 2 bits for each here, and with
        # M codebooks as many weights are summed up.
        (ONE_LARGE, 2),
        ({"num_codebooks": 2}, 2),
        ({"num_codebooks": 2, "start": "residual", "codebook_update": "adam"}, 2),
        # With a beam, the gradients of all its lanes.
        ({**ONE_LARGE, "beam": 4}, 4),
        ({"num_codebooks": 2, "beam": 8}, 8),
    ],
    ids=str,
)
def test_no_array_of_aqlm_grows_with_the_codebook(options, most):
    """A table of 512 positions, 65,536 centroids and D = 8 coordinates would have 16."""
    settings = AQLMSettings(**options)
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = floats(4096, 4096), floats(4096, 4096), floats(4096, 4096), key
    size, what = largest_array(lambda *args: aqlm.quantize(*args, settings), *args)
    assert size <= most * 4096 * 4096, what
