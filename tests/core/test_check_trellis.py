"""A crafted TrellisTensor reaches neither a kernel nor a lookup."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.check_tensor import check_tensor, check_values, named_arrays
from gptvq_jax.ops.vq_matmul import vq_matmul
from gptvq_jax.study.sample_tensors import random_trellis


def sample(**fields):
    return dataclasses.replace(random_trellis(24, 21, 7, 12, 3, 4, seed=1), **fields)


def test_a_whole_tensor_passes():
    check_tensor(sample())
    check_values(sample())
    check_tensor(random_trellis(24, 21, outliers=0))


@pytest.mark.parametrize("name", [name for name, _ in named_arrays(sample())])
def test_an_array_of_another_dtype_or_shape_is_named(name):
    array = getattr(sample(), name)
    for other in (array.astype(np.int32), array[None], array[:0]):
        with pytest.raises(ValueError, match=name):
            check_tensor(sample(**{name: other}))
    if name not in ("codes", "levels", "outlier_gaps", "outlier_values"):
        with pytest.raises(ValueError, match=name):
            check_tensor(sample(**{name: array[:-1]}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_bits": 3}, "window_bits=3 must be 4 to 16"),
        ({"window_bits": 17}, "window_bits=17"),
        ({"window_bits": 7.0}, "window_bits=7.0"),
        ({"window_bits": 13}, "stream_rows=12 must be from window_bits=13"),
        ({"stream_rows": 1000}, "stream_rows=1000 must be from"),
        ({"stream_rows": 0}, "stream_rows=0"),
        ({"rows": 0}, "rows=0"),
        ({"rows": 2**20, "cols": 2**20}, "rows \\* cols"),
        ({"table": 2}, "table=2 is not 1, .* quantize again"),
        ({"levels": np.ones(3, np.float16)}, "levels must be a power of two"),
        ({"levels": np.ones(256, np.float16)}, "levels must be a power of two up to 2"),
        ({"outlier_gaps": None}, "outlier_gaps is missing"),
        ({"outlier_values": None}, "outlier_values is missing"),
    ],
)
def test_what_no_tensor_has_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        check_tensor(sample(**fields))
    with pytest.raises(ValueError, match=message):
        vq_matmul(np.ones((1, 21), np.float32), sample(**fields), implementation="xla")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codes": sample().codes[:-1]}, "codes has .* bytes, the rates make it"),
        ({"codes": np.zeros(10**4, np.uint8)}, "codes has 10000 bytes"),
        ({"rates": np.full(11, 0x77, np.uint8)}, "rates reach 7, at most 6"),
        ({"outlier_gaps": np.full(3, 65535, np.uint16)}, "an outlier lies at 196605, beyond 504"),
        ({"row_scales": np.full(24, np.nan, np.float16)}, "row_scales contains NaN"),
        ({"outlier_values": np.full(3, np.inf, np.float16)}, "outlier_values contains NaN or Inf"),
    ],
)
def test_values_that_contradict_each_other(fields, message):
    check_tensor(sample(**fields))
    with pytest.raises(ValueError, match=message):
        check_values(sample(**fields))


def test_rates_that_point_outside_reach_no_kernel():
    """What a file says is checked when it is read; so it is before streams are rearranged."""
    x = jnp.ones((1, 21), jnp.float32)
    short = sample(codes=sample().codes[:5])  # what no file may say (check_values)
    assert np.isfinite(vq_matmul(x, short, implementation="xla")).all()
    try:
        with pytest.raises(ValueError, match="codes has 5 bytes, the rates make it"):
            vq_matmul(x, short, implementation="cpu")
        outside = sample(outlier_gaps=np.full(3, 65535, np.uint16))
        with pytest.raises(ValueError, match="an outlier lies at 196605"):
            vq_matmul(x, outside, implementation="cpu")
    except NotImplementedError as error:  # no compiler
        pytest.skip(str(error))
