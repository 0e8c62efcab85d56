"""The 4-bit baseline: its kernel and its plain form stand for the same weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base import relative_error
from test_cpu import needs_compiler

from gptvq_jax.ops.int4 import Int4Kernel, random_int4


def _decoded(kernel: Int4Kernel) -> np.ndarray:
    codes = np.asarray(kernel.codes)
    nibbles = np.stack([codes % 16, codes // 16], axis=-1).reshape(codes.shape[0], -1)
    return (nibbles - 8.0) * np.repeat(np.asarray(kernel.scale, np.float64), 128, axis=1)


def test_dequantize_is_the_formula():
    kernel = random_int4(5, 256)
    np.testing.assert_allclose(jax.jit(Int4Kernel.dequantize)(kernel), _decoded(kernel), rtol=1e-6)


@needs_compiler
@pytest.mark.parametrize("batch", [1, 3])
def test_kernel_agrees_but_for_rounded_activations(batch):
    kernel = random_int4(13, 384)
    x = np.random.default_rng(0).normal(size=(batch, 384))
    y = jnp.asarray(x, jnp.float32) @ jax.tree.map(jnp.asarray, kernel)
    assert relative_error(y, x @ _decoded(kernel).T) < 1.5e-2


def test_columns_come_in_groups():
    with pytest.raises(ValueError, match="multiple of 128"):
        random_int4(4, 100)
