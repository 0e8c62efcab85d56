"""The TPU kernel in interpret mode: its arithmetic. test_compile_tpu.py compiles it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_shapes
from base import CASES, MatmulTests, relative_error, tensor_of
from float64 import decode
from jax.experimental.pallas import tpu as pltpu

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.ops import pallas_tpu, vq_matmul
from gptvq_jax.ops.tpu import codes, layout, tables, trellis
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor

REFUSED = ("block scales", "block scales, ragged", "aqlm 1x12", "aqlm 1x16", "4d 3 bit")
# In bfloat16 the tables and the order of rows differ, not how codes and centroids are read.
BFLOAT16 = ("1d 4 bit, ragged", "2d 2 bit, strips of 192", "2d 3 bit", "4d 2 bit", "aqlm 2x8")
BFLOAT16 += ("trellis, 8 bits", "trellis, 12 bits, ragged")
_SLOW = ("trellis, 12 bits, ragged", "trellis, levels")  # in float32: test_trellis_words.py is fast
# Formats and grids (rows, columns, D, rows and columns of a strip) that need what CASES do not.
SHAPES = {
    "several tiles of row strips": (TensorFormat(2, 4), GroupGrid(300, 256, 2, 2, 256)),
    "several tiles of a strip's rows": (TensorFormat(1, 8), GroupGrid(600, 128, 1, 600, 128)),
    "strips of 32 vectors": (TensorFormat(2, 6), GroupGrid(16, 1152, 2, 8, 64)),
    "strips of 96 vectors": (TensorFormat(2, 6), GroupGrid(16, 768, 2, 8, 192)),
    "more column strips than lanes": (TensorFormat(2, 2), GroupGrid(12, 1036, 2, 4, 8)),
    "odd D": (TensorFormat(3, 4), GroupGrid(12, 390, 3, 4, 195)),
    "odd D, int4": (TensorFormat(3, 4, codebook_bits=4), GroupGrid(12, 390, 3, 4, 195)),
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """One block of columns in a step: an interpreter has no latency to hide."""
    monkeypatch.setattr(pallas_tpu, "_LOOKUPS", 1)
    monkeypatch.setattr(trellis, "_CYCLES", 1)
    monkeypatch.setattr(tables, "_TOGETHER", 10**6)


def slow_if(cases, slow):
    """Test parameters, some of which are slow."""
    return [pytest.param(c, marks=pytest.mark.slow if c in slow else ()) for c in cases]


def interpreted(x, tensor, interpret=True):
    # Of a program that runs once; a new function, because what it reads may be patched.
    options = {"xla_backend_optimization_level": 0}
    run = jax.jit(lambda x, kernel: x @ kernel, compiler_options=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "matmul", partial(pallas_tpu.matmul, interpret=interpret))
        return run(x, vq_matmul.pack(tensor, "pallas_tpu"))


def error(tensor, dtype=jnp.float32, batch=2, interpret=True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, tensor.shape[1])), dtype)
    expected = np.asarray(x, np.float64) @ decode(tensor).T
    return relative_error(interpreted(x, tensor, interpret), expected)


class TestPallasTpu(MatmulTests):
    implementation = "pallas_tpu"
    supported = tuple(case for case in CASES if case not in REFUSED)

    def run(self, x, tensor):
        return interpreted(x, tensor)

    @pytest.mark.parametrize("case", slow_if(supported, _SLOW))
    def test_float32_agrees_with_float64(self, case):
        # A batch is padded to 8 rows, up to which all are one kernel.
        self._compare(case, 3, jnp.float32, self.float32_error)

    @pytest.mark.parametrize("case", BFLOAT16)
    def test_bfloat16_agrees_with_float64(self, case):
        self._compare(case, 2, jnp.bfloat16, self.bfloat16_error)

    @pytest.mark.parametrize("batch", [0, 1, 20])
    def test_batches(self, batch, monkeypatch):
        monkeypatch.setattr(pallas_tpu, "_MAX_BATCH_TILE", 16)
        y = self.run(jnp.ones((batch, 512)), tensor_of("2d 2 bit"))
        assert y.shape == (batch, 24)
        if batch:
            self._compare("2d 2 bit", batch, jnp.float32, self.float32_error)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    assert error(random_tensor(*SHAPES[shape])) < 1e-5


@pytest.mark.parametrize("shape", ["odd D", "several tiles of a strip's rows"])
def test_shapes_in_bfloat16(shape):
    assert error(random_tensor(*SHAPES[shape]), jnp.bfloat16) < 2e-2


def test_steps_of_several_blocks(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "_LOOKUPS", 16)  # 5 blocks in steps of 2
    tensor = random_tensor(TensorFormat(2, 4), GroupGrid(64, 1280, 2, 4, 256))
    assert error(tensor) < 1e-5


def test_lookups_of_one_register_at_a_time(monkeypatch):
    monkeypatch.setattr(tables, "_TOGETHER", 8)
    rng = np.random.default_rng(0)
    chunks, index = rng.normal(size=(3, 16, 128)), rng.integers(0, 384, (16, 128))
    found = tables.lookup(lambda i: jnp.asarray(chunks[i], jnp.float32), jnp.asarray(index), 3)
    rows = np.arange(16)[:, None]
    np.testing.assert_array_equal(found, chunks[index // 128, rows, index % 128].astype("float32"))


# Transfers between memories are simulated: what is read before it has arrived is nan.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", ["2d 2 bit, strips of 192", "4d 2 bit"])
def test_simulated_memory(case, dtype):
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert error(tensor_of(case), dtype, interpret=pltpu.InterpretParams()) < tolerance


def test_simulated_memory_keeps_tables():
    tensor = random_tensor(*SHAPES["several tiles of a strip's rows"])
    assert error(tensor, batch=9, interpret=pltpu.InterpretParams()) < 1e-5


@pytest.mark.parametrize("bits", [1, 7, 8])
def test_words_hold_codes(bits):
    tensor = random_tensor(TensorFormat(1, bits), GroupGrid(40, 130, 1, 5, 130))
    geometry = layout.make_layout(tensor)
    words = jax.jit(codes.pack_codes, static_argnums=1)(tensor.unpack_codes(), geometry)
    tiles = [[codes.read_codes(tile[0], geometry) for tile in row] for row in words]
    rows = codes.restore_rows(jnp.swapaxes(jnp.asarray(tiles), 2, 3), geometry)
    np.testing.assert_array_equal(rows[:130].T, tensor.unpack_codes()[0])


@pytest.mark.parametrize("fmt", real_shapes.FORMATS)
@pytest.mark.parametrize("shape", real_shapes.SHAPES)
def test_stays_packed(fmt, shape):
    tensor = real_shapes.abstract_tensor(real_shapes.FORMATS[fmt], *shape)
    packed = jax.eval_shape(pallas_tpu.pack, tensor)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
    assert num_bytes <= 1.05 * tensor.num_bytes


def test_tables_larger_than_vmem_are_refused():
    tensor = real_shapes.abstract_tensor(TensorFormat(8, 8, 65536), 4096, 28672)
    with pytest.raises(NotImplementedError, match="MiB of VMEM"):
        pallas_tpu.check(tensor)
