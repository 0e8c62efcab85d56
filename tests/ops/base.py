"""What every implementation of vq_matmul must do. A test class inherits MatmulTests.

A subclass names its implementation, the cases it supports and, where the hardware is not there, how
to run it; everything else must be refused by its `check`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import decode

from gptvq_jax.ops import vq_matmul
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor, random_trellis

# name -> (format, rows, cols). Sizes are odd on purpose: strips that end short, rows that do not
# fill bytes, groups of one row.
CASES = {
    "1d 2 bit": (TensorFormat(1, 2, 256, 64), 24, 192),
    "1d 3 bit": (TensorFormat(1, 3, 512, 256), 20, 576),
    "1d 4 bit, ragged": (TensorFormat(1, 4, 256, 50), 13, 93),
    "1d 8 bit": (TensorFormat(1, 8, 4096, 256), 24, 320),
    "2d 2 bit": (TensorFormat(2, 4, 1024, 256), 24, 512),
    "2d 2 bit, strips of 192": (TensorFormat(2, 4, 1024, 256), 33, 576),
    "2d 2.5 bit": (TensorFormat(2, 5, 2048, 256), 24, 512),
    "2d 3 bit": (TensorFormat(2, 6, 2048, 256), 40, 512),
    "2d 3 bit, ragged": (TensorFormat(2, 6, 700, 50), 21, 131),
    "2d 3.5 bit": (TensorFormat(2, 7, 4096, 256), 24, 512),
    "2d 4 bit": (TensorFormat(2, 8, 8192, 256), 40, 512),
    "2d 0.5 bit": (TensorFormat(2, 1, 512, 128), 24, 256),
    "4d 2 bit": (TensorFormat(4, 8, 8192, 256), 40, 512),
    "4d 1 bit": (TensorFormat(4, 4, 4096, 256), 24, 576),
    "8d 1 bit": (TensorFormat(8, 8, 0), 24, 512),
    "int4 centroids": (TensorFormat(2, 4, 1024, 256, codebook_bits=4), 24, 512),
    "float16 centroids": (TensorFormat(2, 4, 1024, 256, codebook_bits=16), 24, 512),
    "block scales": (TensorFormat(2, 4, 1024, 256, scale_block_size=16), 24, 512),
    "block scales, ragged": (TensorFormat(1, 3, 600, 40, scale_block_size=8), 17, 93),
    "svd": (TensorFormat(1, 3, 512, 256, rank=2), 24, 512),
    "uniform grid": (TensorFormat(1, 4, 128, 128, codebook_bits=16, rank=2), 24, 512),
    "int8 rows": (TensorFormat(1, 8, 576, 10**6, codebook_bits=16, rank=1), 33, 576),
    "aqlm 2x8": (
        TensorFormat(8, 8, 0, codebook_bits=16, num_codebooks=2, row_scales=True),
        24,
        512,
    ),
    "aqlm 1x12": (TensorFormat(8, 12, 0, codebook_bits=16), 24, 256),
    "aqlm 1x16": (TensorFormat(8, 16, 0, codebook_bits=16), 24, 256),
    "4d 3 bit": (TensorFormat(4, 12, 0, row_scales=True), 24, 512),
    "2 int8 codebooks": (TensorFormat(4, 8, 8192, 256, num_codebooks=2), 40, 512),
    "trellis, 8 bits": (dict(window_bits=8, stream_rows=16), 48, 96),
    "trellis, 12 bits, ragged": (dict(window_bits=12, stream_rows=13, outliers=0), 31, 43),
    "trellis, levels": (dict(window_bits=6, stream_rows=24, level_bits=4), 24, 64),
}
TRELLIS = tuple(case for case in CASES if case.startswith("trellis"))
BATCHES = (1, 6)  # six rows are cut into tiles of four and of one by some


@functools.cache
def tensor_of(case: str):
    fmt, rows, cols = CASES[case]
    if case in TRELLIS:
        return jax.tree.map(jnp.asarray, random_trellis(rows, cols, **fmt))
    return jax.tree.map(jnp.asarray, random_tensor(fmt, fmt.grid(rows, cols), seed=1))


@functools.cache
def decoded(case: str) -> np.ndarray:
    return decode(tensor_of(case))


def relative_error(actual, expected) -> float:
    actual = np.asarray(actual, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


class MatmulTests:
    """Inherit, and set these."""

    implementation: str
    supported = tuple(CASES)
    float32_error = 1e-5
    bfloat16_error = 2e-2

    def run(self, x, tensor):
        """The product; override to run a kernel in interpret mode."""
        return jax.jit(lambda x, kernel: x @ kernel)(
            x, vq_matmul.make_kernel(tensor, self.implementation)
        )

    def check(self, tensor):
        vq_matmul.check_supported(tensor, self.implementation)

    @pytest.mark.parametrize("batch", BATCHES)
    @pytest.mark.parametrize("case", CASES)
    def test_float32_agrees_with_float64(self, case, batch):
        self._compare(case, batch, jnp.float32, self.float32_error)

    @pytest.mark.parametrize("case", CASES)
    def test_bfloat16_agrees_with_float64(self, case):
        self._compare(case, 2, jnp.bfloat16, self.bfloat16_error)

    @pytest.mark.parametrize("case", CASES)
    def test_what_is_not_supported_is_refused(self, case):
        if case in self.supported:
            self.check(tensor_of(case))
            return
        with pytest.raises(NotImplementedError):
            self.check(tensor_of(case))

    def _compare(self, case, batch, dtype, tolerance):
        if case not in self.supported:
            pytest.skip("not supported, which test_what_is_not_supported_is_refused checks")
        tensor = tensor_of(case)
        x = np.random.default_rng(batch).normal(size=(batch, tensor.shape[1]))
        x = jnp.asarray(x, dtype)
        y = self.run(x, tensor)
        assert y.shape == (batch, tensor.shape[0])
        expected = np.asarray(x, np.float64) @ decoded(case).T
        assert relative_error(y, expected) < tolerance
