"""Parameters of a leaf: their decode against the stored form, their gradient against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import decode as float64_decode

from gptvq_jax.core.quantized_tensor import dequantize_compiled
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import DenseCodebook, FactoredCodebook, VQTensor
from gptvq_jax.methods import trainable
from gptvq_jax.methods.trainable import parameters, straight_through, unpack, with_codes
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor, random_trellis

# Programs of their own, as in the driver.
_decode = jax.jit(trainable.decode)
_with_parameters = jax.jit(trainable.with_parameters)
_gradient = jax.jit(jax.grad(lambda p, tensor, by: jnp.vdot(by, trainable.decode(tensor, p))))


def decode(leaf, params):
    return _decode(unpack(leaf), params)


def with_parameters(leaf, params):
    return with_codes(leaf, _with_parameters(unpack(leaf).leaf, params))


def gradient(params, leaf, by):
    """With respect to parameters, of the weight times `by`."""
    return _gradient(params, unpack(leaf), by)


ROWS, COLS = 7, 11  # strips, vectors, scale blocks and bytes all end short
FORMATS = {
    "int8": TensorFormat(2, 3, 24, 6),
    "int4": TensorFormat(2, 3, 24, 6, codebook_bits=4, scale_block_size=4),
    "float16": TensorFormat(4, 2, 40, 8, codebook_bits=16, scale_block_size=4),
    "factored int8": TensorFormat(1, 3, 24, 6, rank=2),
    "factored float16": TensorFormat(1, 3, 24, 6, codebook_bits=16, rank=2, scale_block_size=4),
    "aqlm": TensorFormat(4, 3, codebook_bits=16, num_codebooks=2, row_scales=True),
}
TRELLIS = {"trellis": {"outliers": 3}, "trellis, levels": {"outliers": 0, "level_bits": 3}}
NAMES = (*FORMATS, *TRELLIS)


@functools.cache
def made(name: str) -> VQTensor | TrellisTensor:
    """A tensor rounded as the methods round; its codes and their spare bits are random."""
    if name in TRELLIS:
        tensor = random_trellis(ROWS, COLS, window_bits=6, stream_rows=6, **TRELLIS[name], seed=3)
        return jax.tree.map(jnp.asarray, tensor)
    fmt = FORMATS[name]
    tensor = jax.tree.map(jnp.asarray, random_tensor(fmt, fmt.grid(ROWS, COLS), seed=3))
    return with_parameters(tensor, own(tensor))


def own(tensor) -> dict[str, jax.Array]:
    """Its parameters as `decode` takes them."""
    return parameters(unpack(tensor).leaf)


def moved(tensor, seed: int = 0) -> dict[str, jax.Array]:
    """Its parameters, each changed by a few percent."""
    rng = np.random.default_rng(seed)
    return {
        name: p * jnp.asarray(rng.uniform(0.9, 1.1, p.shape), jnp.float32)
        for name, p in own(tensor).items()
    }


def unrounded(tensor, params) -> np.ndarray:
    """The weight (R, C) that float64 parameters stand for."""
    if isinstance(tensor, TrellisTensor):
        count = 0 if tensor.outlier_values is None else len(tensor.outlier_values)
        params = dict(params)
        added = params.pop("outlier_values")[:count]
        return float64_decode(
            dataclasses.replace(tensor, **params, outlier_values=added if count else None)
        )
    if "centroids" in params:
        centroids = params["centroids"]
        codebook = DenseCodebook(centroids, None, 16, *centroids.shape[-2:])
    else:
        codebook = FactoredCodebook(params["left"], None, params["right"])
    blocks = tensor.block_scales
    if blocks is not None:
        offset, step = params["block_offset"], params["block_step"]
        blocks = dataclasses.replace(blocks, offset=offset, step=step)
    scales = params.get("row_scales")
    return float64_decode(
        dataclasses.replace(tensor, codebook=codebook, row_scales=scales, block_scales=blocks)
    )


@pytest.mark.parametrize("name", NAMES)
def test_own_parameters_give_the_same_bytes(name):
    tensor = made(name)
    again = with_parameters(tensor, own(tensor))
    assert jax.tree.structure(again) == jax.tree.structure(tensor)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tensor), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_decode_gives_the_stored_weight(name):
    """To the last bit; and that is the weight of the parameters, but for rounding."""
    tensor = made(name)
    params = moved(tensor)
    weight = np.asarray(decode(tensor, params))
    stored = with_parameters(tensor, params)
    np.testing.assert_array_equal(weight, dequantize_compiled(stored))
    assert jax.tree.map(lambda a: a.dtype, stored) == jax.tree.map(lambda a: a.dtype, tensor)

    params = {n: np.asarray(p, np.float64) for n, p in params.items()}
    steps = {"int4": 7, "int8": 127, "factored int8": 127}.get(name, 1000)
    peak = np.abs(unrounded(tensor, params)).max()
    error = np.abs(weight - unrounded(tensor, params)).max()
    # A block scale has its logarithm rounded, of 11 bits too.
    assert 0 < error < (2.0 if "block_step" in params else 0.8) * peak / steps
    assert error < np.abs(weight - float64_decode(tensor)).max()  # the changes are in it


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_unrounded_weight(name):
    """Against central differences in float64: the weight has degree 1 in each parameter, but for
    the logarithms of block scales."""
    tensor = made(name)
    params = {n: np.asarray(p, np.float64) for n, p in own(tensor).items()}
    of_weight = np.random.default_rng(1).normal(size=(ROWS, COLS)).astype(np.float32)

    gradients = gradient(own(tensor), tensor, of_weight)
    assert gradients.keys() == params.keys()
    for n, array in params.items():
        expected, size = np.empty_like(array), 1e-3 if n.startswith("block") else 0.5
        for i in np.ndindex(*array.shape):
            ends = []
            for step in (size, -size):
                changed = array.copy()
                changed[i] += step
                ends.append(np.vdot(of_weight, unrounded(tensor, {**params, n: changed})))
            expected[i] = (ends[0] - ends[1]) / (2 * size)
        np.testing.assert_allclose(
            gradients[n], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
        )


def test_gradient_passes_the_rounding_where_it_is_coarse():
    """Half of a step away from int4 levels, where the derivative of the rounding itself is 0."""
    tensor = made("int4")
    params = parameters(tensor)
    shifted = params["centroids"] + 0.4 * tensor.codebook.scale[..., None, None]
    params = {**params, "centroids": shifted}
    ones = np.ones((ROWS, COLS), np.float32)
    between = gradient(params, tensor, ones)["centroids"]
    np.testing.assert_allclose(between, gradient(parameters(tensor), tensor, ones)["centroids"])
    assert np.abs(between).max() > 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_an_array_is_rounded_to_its_dtype(dtype):
    scale = jnp.linspace(0.5, 1.5, 5).astype(dtype)
    np.testing.assert_array_equal(with_parameters(scale, parameters(scale)), scale)
    params = {"values": jnp.linspace(0.3, 1.3, 5)}
    stored = with_parameters(scale, params)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(decode(scale, params), stored.astype(jnp.float32))
    np.testing.assert_array_equal(gradient(params, scale, jnp.arange(5.0))["values"], np.arange(5))


def test_straight_through_is_differentiated_both_ways():
    def twice(x):
        return 2 * straight_through(x, jnp.round(x))

    assert jax.value_and_grad(twice)(1.3) == (2.0, 2.0)
    assert jax.jvp(twice, (1.3,), (1.0,)) == (2.0, 2.0)
