"""The entry: which implementation runs, what is refused, a kernel in the place of a dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base import decoded, relative_error, tensor_of

from gptvq_jax.ops import vq_matmul as entry
from gptvq_jax.ops.cpu import build
from gptvq_jax.ops.cuda import build as cuda_build
from gptvq_jax.ops.vq_matmul import make_kernel, vq_matmul


@pytest.fixture
def no_compiler(monkeypatch):
    """As where no C++ compiler is installed."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    build._load_once.cache_clear()
    entry._logged.clear()
    yield
    build._load_once.cache_clear()


@pytest.fixture
def logged(monkeypatch):
    messages = []
    monkeypatch.setattr(entry.logging, "info", messages.append)
    return messages


def test_leading_axes_and_dtype_are_those_of_x():
    tensor = tensor_of("2d 2 bit")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 512)), jnp.bfloat16)
    y = vq_matmul(x, tensor, implementation="reference")
    assert y.shape == (2, 3, 24) and y.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ decoded("2d 2 bit").T
    assert relative_error(y, expected) < 1e-2


@pytest.mark.parametrize("case, rows", [("2d 3 bit", 40), ("aqlm 2x8", 24)])
def test_a_kernel_is_a_leaf_of_packed_arrays(case, rows):
    tensor = tensor_of(case)
    kernel = make_kernel(tensor, "xla")
    assert kernel.shape == (512, rows)  # (in, out)
    assert kernel.num_bytes == tensor.num_bytes
    doubled = jax.jit(lambda kernel, x: x @ kernel)(kernel, jnp.eye(512))
    np.testing.assert_allclose(doubled, decoded(case).T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu", "cpu"])
def test_no_implementation_ignores_row_scales(name):
    module, tensor = entry._module(name), tensor_of("aqlm 2x8")
    with pytest.raises(AssertionError, match="row scales"):
        module.matmul(jnp.ones((1, 512)), module.pack(tensor))


def test_an_unknown_implementation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'metal'.*auto, reference, xla"):
        vq_matmul(jnp.ones((1, 512)), tensor_of("2d 2 bit"), implementation="metal")


def test_columns_must_match():
    with pytest.raises(ValueError, match="511 columns.*512"):
        vq_matmul(jnp.ones((1, 511)), tensor_of("2d 2 bit"), implementation="xla")


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating point, not int32"):
        vq_matmul(jnp.ones((1, 512), jnp.int32), tensor_of("2d 2 bit"), implementation="xla")


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu", "cuda"])
def test_hardware_that_is_not_there_is_refused(name):
    with pytest.raises(NotImplementedError, match=f"'{name}' cannot run: it needs a .PU.*'xla'"):
        make_kernel(tensor_of("2d 2 bit"), name)


def test_a_named_implementation_does_not_fall_back():
    with pytest.raises(NotImplementedError, match="must be int8 or int4; use 'xla'"):
        make_kernel(tensor_of("float16 centroids"), "cpu_int8")


@pytest.mark.parametrize("name", ["pallas_tpu", "cpu_int8"])
def test_codes_of_12_bits_are_refused_with_an_implementation_that_reads_them(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: name.removeprefix("pallas_")[:3])
    with pytest.raises(NotImplementedError, match="codes .*12.*use 'xla', which supports every"):
        make_kernel(tensor_of("4d 3 bit"), name)


def test_auto_falls_back_where_there_is_no_compiler_and_says_so_once(no_compiler, logged):
    for case in ("2d 2 bit", "2d 3 bit"):
        assert make_kernel(tensor_of(case)).implementation == "xla"
    assert len(logged) == 1
    assert "auto chose xla" in logged[0] and "not cpu: it needs a C++ compiler" in logged[0]


def test_auto_on_a_gpu_goes_from_cuda_to_triton_and_says_why(monkeypatch, logged):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cuda_build, "_load_once", lambda: None)
    entry._logged.clear()
    assert entry._choose(tensor_of("2d 2 bit"), "auto") == "cuda"
    assert entry._choose(tensor_of("2d 3 bit"), "auto") == "pallas_gpu"
    assert "not cuda: it takes one codebook with codes of 4 bits" in logged[1]
    assert entry._choose(tensor_of("trellis, 8 bits"), "auto") == "xla"
    monkeypatch.setattr(cuda_build, "_load_once", lambda: "it needs nvcc and there is none here")
    assert entry._choose(tensor_of("2d 2 bit"), "auto") == "pallas_gpu"
    assert "auto chose pallas_gpu" in logged[3] and "not cuda: it needs nvcc" in logged[3]


def test_cpu_without_a_compiler_names_the_fix(no_compiler):
    with pytest.raises(NotImplementedError, match=r"install g\+\+, or set CXX.*use 'xla'"):
        make_kernel(tensor_of("2d 2 bit"), "cpu")
