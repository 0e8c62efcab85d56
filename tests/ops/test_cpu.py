"""The C++ kernels, in the instruction set of this machine."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from base import CASES, MatmulTests

from gptvq_jax.ops.vq_matmul import make_kernel
from gptvq_jax.study.decode_formats import FORMATS
from gptvq_jax.study.sample_tensors import random_tensor

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)
pytestmark = needs_compiler
_NOT_INT8 = ("4d 3 bit", "float16", "block", "svd", "uniform", "int8 rows", "aqlm")


class TestExact(MatmulTests):
    implementation = "cpu"


class TestInt8(MatmulTests):
    implementation = "cpu_int8"
    supported = tuple(case for case in CASES if not case.startswith(_NOT_INT8))
    float32_error = 1e-2  # of rounding x

    def test_rows_with_large_activations_have_two_digits(self):
        """One would cost the small ones 0.3 here; of rows without large ones it is enough."""
        fmt = FORMATS["2d_2.25"]
        tensor = random_tensor(fmt, fmt.grid(64, 1024))
        x = np.random.default_rng(0).normal(size=(2, 1024)).astype(np.float32)
        exact, rounded = (make_kernel(tensor, name) for name in ("cpu", "cpu_int8"))
        assert not np.array_equal(jnp.asarray(x) @ exact, jnp.asarray(x) @ rounded)
        x[1, 300] = 200
        np.testing.assert_allclose(jnp.asarray(x) @ rounded, jnp.asarray(x) @ exact, atol=5e-3)
