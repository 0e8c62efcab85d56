"""The kernels for a block of columns, interpreted, against the moves that define them."""

from functools import partial

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.methods import gptvq, uniform
from gptvq_jax.moves.recode import recode
from gptvq_jax.moves.refit import decode
from gptvq_jax.moves.residual import residual_of
from gptvq_jax.moves.scales import normalize_strip
from gptvq_jax.moves.sweep import pad_identity, sweep
from gptvq_jax.ops.column_frame import Block
from gptvq_jax.ops.columns import KERNELS, choose_columns
from gptvq_jax.ops.gpu import columns as gpu
from gptvq_jax.ops.tpu import columns as tpu

ROWS, COLS = 7, 22  # both axes are padded, and with dim=3 the edge cuts the last vector
GRIDS = {
    2: GroupGrid(ROWS, COLS, 2, strip_rows=3, strip_cols=8),
    3: GroupGrid(ROWS, COLS, 3, strip_rows=3, strip_cols=9),
}
# D, K, columns per lazy update: 5 and 4 centroids are searched one by one and four at once. With
# scales of blocks, with none.
CASES = [(2, 5, 4, 0), pytest.param(3, 4, 3, 3, marks=pytest.mark.slow)]


@pytest.fixture(params=KERNELS)
def native(request, monkeypatch):
    """The name of a kernel, which is interpreted."""
    module = KERNELS[request.param]
    for move in ("sweep", "recode"):
        monkeypatch.setattr(module, move, partial(getattr(module, move), interpret=True))
    return request.param


def inputs(dim, size):
    p, rng = ref.problem(ROWS, COLS, seed=3), np.random.default_rng(dim)
    return p, jnp.asarray(rng.normal(size=(size, dim)), jnp.float32)


def swept(native, dim, size, block_size, scale_block_size, mix=0.5, exact_metric=True):
    """Codebooks are `book`, and a bit of what the sweep hands to `fit`."""
    grid, (p, book) = GRIDS[dim], inputs(dim, size)
    normalize = None
    if scale_block_size:
        normalize = partial(normalize_strip, block_size=scale_block_size)

    def fit(data, keys):
        del keys
        return book + mix * data.points[:, :1, :, 0]

    @jax.jit
    def run(weight, hinv_chol):
        return sweep(
            grid.pad_transpose(weight),
            pad_identity(hinv_chol, grid),
            grid,
            fit,
            jax.random.key(0),
            block_size=block_size,
            exact_metric=exact_metric,
            normalize=normalize,
            native=native,
        )

    result = run(p.weight, p.hinv_chol)
    codes = result.codes[: grid.num_vectors, :ROWS]
    return codes, grid.unpad_transpose(result.quantized), result.loss, result.centroids


@pytest.mark.parametrize(("dim", "size", "block_size", "scales"), CASES)
def test_a_sweep_by_the_kernel_is_the_sweep(native, dim, size, block_size, scales):
    found = swept(native, dim, size, block_size, scales)
    expected = swept("jax", dim, size, block_size, scales)
    np.testing.assert_array_equal(found[0], expected[0])
    assert len(np.unique(found[0])) >= 3
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_kernel_takes_the_papers_metric(native):
    found = swept(native, 2, 5, 4, 0, exact_metric=False)[0]
    np.testing.assert_array_equal(found, swept("jax", 2, 5, 4, 0, exact_metric=False)[0])
    assert (found != swept(native, 2, 5, 4, 0)[0]).any()


def recoded(native, dim, size, block_size, scaled, dead=False):
    grid, (p, _) = GRIDS[dim], inputs(dim, size)
    rng = np.random.default_rng(7)
    vectors = grid.padded_cols // dim
    scales = jnp.asarray(2.0 ** rng.uniform(-2, 2, (vectors, grid.padded_rows)), jnp.float32)
    books = jnp.asarray(
        rng.normal(size=(1, grid.col_strips, grid.row_strips, size, dim)), jnp.float32
    )
    codes = jnp.asarray(rng.integers(0, size, (1, vectors, grid.padded_rows)), jnp.int32)
    hessian = jnp.pad((1 - dead) * p.hessian, ((0, grid.padded_cols - COLS),) * 2)
    scales = scales if scaled else None

    @jax.jit
    def run(weight, hessian, books, codes, scales):
        residual = residual_of(weight, decode(books, codes, scales, grid), hessian)
        options = {"passes": 2, "block_size": block_size, "native": native}
        return residual, *recode(residual, hessian, books, codes, scales, grid, **options)

    before, found, after = run(grid.pad_transpose(p.weight), hessian, books, codes, scales)
    return codes, before, found, after


@pytest.mark.parametrize(("dim", "size", "block_size", "scaled"), CASES)
def test_a_recode_by_the_kernel_is_the_recode(native, dim, size, block_size, scaled):
    old, before, found, after = recoded(native, dim, size, block_size, scaled)
    _, _, expected, residual = recoded("jax", dim, size, block_size, scaled)
    np.testing.assert_array_equal(found, expected)
    assert np.mean(found != old) > 0.3 and after.loss < 0.9 * before.loss
    for a, b in zip(after, residual, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_without_input_energy_the_kernel_keeps_the_codes(native):
    old, _, found, _ = recoded(native, 2, 5, 4, False, dead=True)
    np.testing.assert_array_equal(found, old)


def test_a_recode_of_what_the_kernel_does_not_take_is_refused():
    grid = GRIDS[2]
    zeros = jnp.zeros((grid.padded_cols, grid.padded_rows))
    books = jnp.zeros((2, grid.col_strips, grid.row_strips, 4, 2))
    codes = jnp.zeros((2, grid.padded_cols // 2, grid.padded_rows), jnp.int32)
    residual = residual_of(zeros, zeros, jnp.eye(grid.padded_cols))
    with pytest.raises(NotImplementedError, match="one codebook and a beam of 1, not 2 and 1"):
        recode(residual, jnp.eye(grid.padded_cols), books, codes, None, grid, native="pallas_gpu")


LAYER = GroupGrid(8192, 28672, 2, strip_rows=8, strip_cols=256)


@pytest.mark.parametrize(
    ("backend", "size", "block_size", "name"),
    [
        ("gpu", 16, 128, "pallas_gpu"),
        ("tpu", 16, 128, "pallas_tpu"),
        ("tpu", 4096, 128, "jax"),  # 64 MiB of centroids
        ("cpu", 16, 128, "jax"),
        ("another", 16, 128, "jax"),
    ],
)
def test_every_backend_takes_its_own_kernel_where_it_fits(
    monkeypatch, backend, size, block_size, name
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert choose_columns(LAYER, size, block_size) == name


@pytest.mark.parametrize("method", [gptvq, uniform])
def test_methods_take_the_kernel_that_is_chosen(native, method, monkeypatch):
    """What they make by it is what they make without it."""
    settings = {
        gptvq: gptvq.GPTVQSettings(
            dim=2, bits=1.0, group_size=32, em_iterations=1, polish_rounds=1, block_size=4
        ),
        uniform: uniform.UniformSettings(bits=2, group_size=8, block_size=4),
    }[method]
    quantize = method.quantize if method is gptvq else method.gptq
    p = ref.problem(8, 16, seed=2)
    arguments = p.weight, p.hessian, p.hinv_chol, jax.random.key(0), settings
    called = []

    def chosen(*sizes):
        called.append(sizes)
        return native

    expected = quantize(*arguments)
    monkeypatch.setattr(method, "choose_columns", chosen)
    jax.clear_caches()  # of a program that was traced with another choice
    found = quantize(*arguments)
    assert called
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3)
    monkeypatch.undo()
    jax.clear_caches()


def test_blocks_without_room_name_the_fix():
    for module in (gpu, tpu):
        with pytest.raises(NotImplementedError, match="set block_size to at most 256"):
            module.check(512, 2, 16, (1024, 1024))
    with pytest.raises(NotImplementedError, match="MiB of VMEM.*fewer bits"):
        tpu.check(128, 2, 4096, (1024, 1024))
    with pytest.raises(NotImplementedError, match="64-bit indices"):
        gpu.check(128, 2, 16, (65536, 65536))
    zeros = jnp.zeros((512, 4))
    tables = (jnp.zeros((256, 2, 2)),) * 2
    block = Block(
        512, jnp.int32(0), zeros, jnp.zeros((512, 512)), tables, jnp.zeros((1, 1, 4, 2)), None, 512
    )
    with pytest.raises(NotImplementedError, match="set block_size to at most 256"):
        gpu.sweep(block, jnp.zeros((256, 4), jnp.int32), jnp.zeros(4), 4)
