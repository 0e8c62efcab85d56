"""Products with a weight in every form that programs have, by rows and matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gptvq_jax.flax_tree.interpret import Reader, interpret, weight_of
from gptvq_jax.flax_tree.kernel import Layout


class ByMatrices(Reader):
    """Multiplies rows by matrices cut from the kernel, and keeps what it saw."""

    def __init__(self, kernel):
        self._kernel = kernel
        self.layouts, self.others, self.rows = set(), [], []

    def kernel(self, name):
        return self._kernel

    def product(self, product, dense):
        layout = product.layout
        self.layouts.add(layout)
        matrices = layout.matrices(self._kernel)[jnp.array(product.indices())]
        x = product.rows()
        self.rows.append(x)
        y = product.result(jnp.einsum("bnc,brc->bnr", x, matrices.astype(x.dtype)))
        assert (y.shape, y.dtype) == (dense().shape, dense().dtype)
        return y

    def other(self, weight, what):
        self.others.append(what)


def turns(kernel, x):
    def turn(carry, row):
        return jnp.tanh(carry @ row), carry.sum()

    return lax.scan(turn, x, kernel)


def turns_back(kernel, x):
    return lax.scan(lambda carry, row: (carry @ row.T, None), x, kernel, reverse=True)[0]


def shared_by_turns(kernel, x):
    return lax.scan(lambda carry, row: (jnp.tanh(carry @ kernel), row @ kernel), x[0], x)


def repeated(kernel, x):
    again = lambda state: (state[0] + 1, jnp.tanh(state[1] @ kernel))  # noqa: E731
    return lax.while_loop(lambda state: (state[1] @ kernel).sum() + state[0] < 3, again, (0, x))


def branched(kernel, x):
    return lax.cond(x.sum() > 0, lambda: x @ kernel, lambda: 2 * (x @ kernel))


@jax.custom_jvp
def special(kernel, x):
    return x @ kernel


special.defjvps(None, None)


def convolved(x, kernel, **options):
    numbers = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}[kernel.ndim]
    options = {"window_strides": (1,) * (kernel.ndim - 2), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


def of_channels_first(kernel, x):
    return lax.conv_general_dilated(
        x, kernel, (2, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


CASES = {  # {name: (function of kernel and x, shape of kernel, shape of x, batch axes, in axes)}
    "matmul": (lambda k, x: x @ k, (4, 6), (2, 3, 4), (), (0,)),
    "vector": (lambda k, x: x @ k, (4, 6), (4,), (), (0,)),
    "transposed": (lambda k, x: x @ k.T, (6, 4), (5, 4), (), (1,)),
    "on the left": (lambda k, x: jnp.einsum("df,btd->fbt", k, x), (4, 6), (2, 3, 4), (), (0,)),
    "heads": (lambda k, x: jnp.einsum("btd,dhk->bhtk", x, k), (4, 2, 3), (2, 5, 4), (), (0,)),
    "of heads": (
        lambda k, x: jnp.einsum("bthk,hkd->btd", x, k),
        (2, 3, 4),
        (1, 5, 2, 3),
        (),
        (0, 1),
    ),
    "of heads, swapped": (
        lambda k, x: jnp.einsum("btkh,hkd->btd", x, k),
        *((2, 3, 4), (1, 5, 3, 2), (), (0, 1)),
    ),
    "experts": (lambda k, x: jnp.einsum("ebd,edf->ebf", x, k), (3, 4, 2), (3, 5, 4), (0,), (1,)),
    "experts in the middle": (
        lambda k, x: jnp.einsum("bed,def->bfe", x, k),
        *((4, 3, 2), (5, 3, 4), (1,), (0,)),
    ),
    "merged": (
        lambda k, x: x.reshape(5, 6) @ k.reshape(6, 4),
        *((2, 3, 4), (5, 2, 3), (), (0, 1)),
    ),
    "cut": (
        lambda k, x: jnp.einsum("bd,dhk->bhk", x, k.reshape(4, 2, 3)),
        *((4, 6), (5, 4), (), (0,)),
    ),
    "called": (lambda k, x: jax.jit(lambda a, b: jnp.dot(b, a))(k, x), (4, 6), (5, 4), (), (0,)),
    "remat": (lambda k, x: jax.checkpoint(lambda a: x @ a)(k), (4, 6), (5, 4), (), (0,)),
    "custom": (special, (4, 6), (5, 4), (), (0,)),
    "vmap": (lambda k, x: jax.vmap(jnp.matmul)(x, k), (3, 4, 2), (3, 5, 4), (0,), (1,)),
    "stacked": (turns, (3, 4, 4), (5, 4), (0,), (1,)),
    "stacked, from the last": (turns_back, (3, 4, 4), (5, 4), (0,), (2,)),
    "in a loop": (shared_by_turns, (4, 4), (3, 5, 4), (), (0,)),
    "in a while loop": (repeated, (4, 4), (5, 4), (), (0,)),
    "in branches": (branched, (4, 6), (5, 4), (), (0,)),
    "convolution": (lambda k, x: convolved(x, k), (3, 3, 2, 5), (1, 6, 5, 2), (), (0, 1, 2)),
    "strides and gaps": (
        lambda k, x: convolved(x, k, window_strides=(2,), rhs_dilation=(2,), padding=[(2, 1)]),
        *((3, 2, 5), (2, 9, 2), (), (0, 1)),
    ),
    "channels first": (of_channels_first, (5, 2, 3, 2), (1, 2, 7, 6), (), (1, 2, 3)),
    "one input": (lambda k, x: x @ k, (1, 6), (5, 1), (), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_product_is_rows_times_matrices(name):
    function, kernel_shape, x_shape, batch, inputs = CASES[name]
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=kernel_shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=x_shape), jnp.float32)
    reader = ByMatrices(kernel)
    weights = {0: weight_of("kernel", kernel)}
    found = jax.jit(lambda k, x: interpret(function, (k, x), weights, reader))(kernel, x)
    expected = jax.jit(function)(kernel, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected
    )
    assert reader.layouts == {Layout(kernel_shape, batch, inputs)} and not reader.others


def test_a_product_in_low_precision_has_its_dtype():
    kernel, x = jnp.ones((4, 6), jnp.float32), jnp.ones((5, 4), jnp.bfloat16)
    for kept in (None, jnp.float32):
        function = lambda k, x: jnp.matmul(  # noqa: E731
            x,
            k.astype(jnp.bfloat16),
            preferred_element_type=kept,  # noqa: B023
        )
        weights = {0: weight_of("k", kernel)}
        run = lambda k, x: interpret(function, (k, x), weights, ByMatrices(k))  # noqa: B023, E731
        y = jax.jit(run)(kernel, x)
        assert y.dtype == (kept or jnp.bfloat16) and float(y[0, 0]) == 4


OTHERS = {
    "add": (lambda k, x: k + x, (4, 6)),
    "gather": (lambda k, x: k[jnp.array([1, 2])] + x[:2], (4, 6)),
    "dot_general": (lambda k, x: k @ k.T, (4, 6)),
    "the output": (lambda k, x: k.reshape(24), (4, 6)),
    "conv_general_dilated": (
        lambda k, x: convolved(x, k, feature_group_count=2),
        (3, 1, 2),
    ),
    "reshape": (lambda k, x: x.T @ k.T.reshape(4, 6), (4, 6)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_product_with_one_weight_reads_the_dense_kernel(what):
    function, shape = OTHERS[what]
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, 7, 2) if kernel.ndim == 3 else shape), jnp.float32)
    reader = ByMatrices(kernel)
    weights = {0: weight_of("kernel", kernel)}
    found = jax.jit(lambda k, x: interpret(function, (k, x), weights, reader))(kernel, x)
    np.testing.assert_allclose(found, jax.jit(function)(kernel, x), rtol=1e-6)
    assert set(reader.others) == {what} and not reader.layouts


def test_a_product_over_part_of_an_axis_is_none():
    kernel, x = jnp.ones((4, 6)), jnp.ones((5, 2))
    function = lambda k, x: jnp.einsum("bd,edf->bef", x, k.reshape(2, 2, 6))  # noqa: E731
    reader = ByMatrices(kernel)
    found = interpret(function, (kernel, x), {0: weight_of("kernel", kernel)}, reader)
    np.testing.assert_array_equal(found, 2 * np.ones((5, 2, 6)))
    assert set(reader.others) == {"dot_general"}


def test_arguments_that_are_no_arrays_stay_as_they_are():
    function = lambda k, x, how: x @ k if how["mode"] == "plain" else x  # noqa: E731
    kernel, x = jnp.ones((4, 6)), jnp.ones((5, 4))
    reader = ByMatrices(kernel)
    weights = {0: weight_of("kernel", kernel)}
    how = {"mode": "plain"}
    found = jax.jit(lambda k, x: interpret(function, (k, x, how), weights, reader))(kernel, x)
    assert found.shape == (5, 6) and reader.layouts
