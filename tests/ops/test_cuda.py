"""The CUDA kernel without a GPU: its source as C++, with loops in the place of blocks and threads.

test_compile_cuda.py compiles it for a GPU.
"""

import ctypes
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base import MatmulTests, decoded, relative_error, tensor_of
from test_cpu import needs_compiler

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.ops import vq_matmul
from gptvq_jax.ops.cpu.build import find_compiler, run_compiler
from gptvq_jax.ops.cuda import build, products
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor

pytestmark = needs_compiler
SUPPORTED = (
    "1d 4 bit, ragged",
    "2d 2 bit",
    "2d 2 bit, strips of 192",
    "4d 1 bit",
    "int4 centroids",
)


@pytest.fixture(scope="module", autouse=True)
def emulation(tmp_path_factory):
    """The kernel's source registered for programs on a CPU."""
    built = tmp_path_factory.mktemp("cuda") / "emulation.so"
    flags = ["-O1", "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC"]
    flags += ["-isystem", jax.ffi.include_dir()]
    source = str(build.SOURCES[0])
    run_compiler([find_compiler(), *flags, "-x", "c++", source, "-o", str(built)], "c++", "")
    build.register(ctypes.CDLL(str(built)), "cpu")


class TestCuda(MatmulTests):
    implementation = "cuda"
    supported = SUPPORTED

    def run(self, x, tensor):
        kernel = vq_matmul.pack(tensor, "cuda")
        return jax.jit(lambda x, kernel: x @ kernel)(x, kernel)

    def check(self, tensor):
        module = vq_matmul._module("cuda")
        if not isinstance(tensor, vq_matmul.VQTensor) or module.why_not(tensor):
            raise NotImplementedError


@pytest.mark.parametrize("grid", [(9, 26, 2, 1, 2), (5, 4160, 1, 3, 4160), (20, 88, 4, 12, 88)])
def test_strips_that_fill_neither_tiles_nor_units(grid):
    grid = GroupGrid(*grid)
    tensor = jax.tree.map(jnp.asarray, random_tensor(TensorFormat(grid.dim, 4), grid))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, grid.cols)), jnp.float32)
    kernel = vq_matmul.pack(tensor, "cuda")
    assert relative_error(x @ kernel, np.asarray(x @ tensor.dequantize().T)) < 1e-5


@pytest.mark.parametrize("case", SUPPORTED)
def test_unpacking_gives_the_weight_back(case):
    tensor = tensor_of(case)
    again = products.unpack(products.pack(tensor))
    np.testing.assert_array_equal(again.dequantize(), tensor.dequantize())


def test_more_rows_of_x_are_multiplied_by_xla(monkeypatch):
    monkeypatch.setattr(build, "TARGET", "no such target")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 512)), jnp.float32)
    y = x @ vq_matmul.pack(tensor_of("2d 2 bit"), "cuda")
    assert relative_error(y, np.asarray(x) @ decoded("2d 2 bit").T) < 1e-5


def test_a_column_of_x_that_dwarfs_others_costs_its_own_strip_alone():
    x = np.random.default_rng(0).normal(size=(1, 512)).astype(np.float32)
    x[0, 3] = 3000
    kernel, weight = vq_matmul.pack(tensor_of("2d 2 bit"), "cuda"), decoded("2d 2 bit").copy()
    y = np.asarray(jnp.asarray(x, jnp.bfloat16) @ kernel, np.float64)
    assert relative_error(y, x @ weight.T) < 1e-2
    x[0, :256] = 0  # the strip of the large one
    y = np.asarray(jnp.asarray(x) @ kernel, np.float64)
    assert relative_error(y, x @ weight.T) < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(bad):
    x = jnp.ones((2, 512)).at[1, 7].set(bad)
    y = np.asarray(x @ vq_matmul.pack(tensor_of("2d 2 bit"), "cuda"))
    assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).any()


def test_arrays_that_do_not_fit_are_refused_by_the_kernel():
    packed = products.pack(tensor_of("2d 2 bit"))
    digits, scales = products.round_x(jnp.ones((1, 512)), packed.grid, 2)
    call = jax.ffi.ffi_call(build.TARGET, jax.ShapeDtypeStruct((1, 24), jnp.float32))
    with pytest.raises(Exception, match="do not fit each other"):
        call(
            digits,
            scales,
            packed.codes[:-1],
            packed.tables,
            packed.scales,
            strip_tiles=np.int64(1),
            rows=np.int64(packed.tile_rows),
        )


def test_without_nvcc_the_error_names_the_packages(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="pip install nvidia-cuda-nvcc.*set NVCC"):
        build.find_nvcc()


def test_a_failing_nvcc_is_quoted(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "k.cu(3): error: no such" >&2; exit 1\n'
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("NVCC", str(nvcc))
    with pytest.raises(NotImplementedError, match=r"k.cu\(3\): error: no such .*nvidia-cuda-nvcc"):
        build.build(tmp_path / "cache", "sm_90")
