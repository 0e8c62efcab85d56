"""The Viterbi kernels of TPUs and GPUs, interpreted, against the search that defines them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.trellis_table import gaussian_values
from gptvq_jax.moves.viterbi import search_streams, tail_biting, viterbi
from gptvq_jax.ops.cpu import viterbi as cpu
from gptvq_jax.ops.gpu import viterbi as gpu
from gptvq_jax.ops.tpu import viterbi as tpu
from gptvq_jax.ops.viterbi import choose_search

KERNELS = {"pallas_tpu": tpu, "pallas_gpu": gpu}
# L, T, streams: two programs of 8 streams and two registers of rows; whole and parted searches.
SMALL = [(4, 136, 9)]
MORE = [(5, 24, 2), (6, 13, 8), (7, 40, 3), (8, 60, 3)]
SIZES = SMALL + [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in MORE]


@pytest.fixture(params=KERNELS)
def native(request, monkeypatch):
    """The name of a kernel, which is interpreted."""
    module = KERNELS[request.param]
    monkeypatch.setattr(module, "tail_biting", partial(module.tail_biting, interpret=True))
    return request.param


def problem(bits, rows, streams):
    rng = np.random.default_rng(bits)
    target = rng.normal(size=(streams, rows)).astype(np.float32)
    weight = rng.uniform(0.2, 2, size=(streams, rows)).astype(np.float32)
    weight[0, 2:5] = 0  # outliers: all windows cost the same there
    return target, weight, jnp.asarray(gaussian_values(bits))


def losses(windows, target, weight, table):
    return np.sum(weight * (target - np.asarray(table)[windows]) ** 2, axis=1, dtype=np.float64)


def assert_same(found, expected, target, weight, table):
    (windows, loss), (best, least) = jax.tree.map(np.asarray, (found, expected))
    np.testing.assert_allclose(loss, least, rtol=1e-5)
    own = losses(windows, target, weight, table)
    np.testing.assert_allclose(own, losses(best, target, weight, table), rtol=1e-5)
    np.testing.assert_allclose(own, loss, rtol=1e-4)
    assert np.mean(windows == best) > 0.95  # of equal costs one or the other is kept


def assert_a_stream_that_bites_its_tail(windows, bits, rate):
    after = np.roll(windows, -1, axis=1)
    np.testing.assert_array_equal(windows >> rate, after % 2 ** (bits - rate))


@pytest.mark.parametrize(("bits", "rows", "streams"), SIZES)
def test_at_every_rate_the_streams_are_those_of_the_search(native, bits, rows, streams):
    target, weight, table = problem(bits, rows, streams)
    run = jax.jit(partial(search_streams, native=native))
    defined = jax.jit(search_streams)
    windows, loss = run(target, weight, table, jnp.int32(0))
    assert not np.any(windows) and not np.any(loss)
    for rate in range(1, min(6, bits) + 1):
        found = run(target, weight, table, jnp.int32(rate))
        expected = defined(target, weight, table, jnp.int32(rate))
        assert_same(found, expected, target, weight, table)
        assert_a_stream_that_bites_its_tail(np.asarray(found[0]), bits, rate)


def test_an_overlap_that_is_given_stays(native):
    bits, rate = 4, 2
    target, weight, table = problem(bits, 24, 9)
    cuts = jnp.arange(9) % 2 ** (bits - rate)
    found = search_streams(target, weight, table, jnp.int32(rate), cuts, native=native)
    expected = viterbi(target, weight, table, rate, cuts)
    assert_same(found, expected, target, weight, table)
    np.testing.assert_array_equal(found[0][:, 0] % 2 ** (bits - rate), cuts)


@pytest.mark.parametrize(
    ("bits", "rate", "rows"), [(12, 2, 30), pytest.param(14, 1, 16, marks=pytest.mark.slow)]
)
def test_long_windows(native, bits, rate, rows):
    target, weight, table = problem(bits, rows, 2)
    around = rows // 2, rows - rows // 2  # as far as any search reaches
    found = KERNELS[native].tail_biting(target, weight, table, rate, around)
    expected = jax.jit(tail_biting, static_argnums=3)(target, weight, table, rate)
    assert_same(found, expected, target, weight, table)


def test_a_name_that_no_kernel_has_is_refused():
    with pytest.raises(ValueError, match="native='pallas' must be one of cpu, jax, pallas_tpu"):
        search_streams(*problem(4, 8, 1), jnp.int32(1), native="pallas")


@pytest.mark.parametrize(
    ("backend", "sizes", "name"),
    [
        ("tpu", (12, 256, 16), "pallas_tpu"),
        ("tpu", (16, 256, 16), "pallas_tpu"),
        ("tpu", (12, 11008, 1), "jax"),  # a way back of 43 MiB
        ("gpu", (12, 256, 16), "pallas_gpu"),
        ("gpu", (15, 256, 16), "jax"),  # more costs than registers
        ("gpu", (14, 256, 1024), "jax"),  # 2^31 bytes
        ("another", (12, 256, 16), "jax"),
    ],
)
def test_every_backend_takes_its_own_kernel_where_it_fits(monkeypatch, backend, sizes, name):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert choose_search(*sizes) == name


@pytest.mark.parametrize("there", [True, False])
def test_a_cpu_takes_its_kernel_if_it_was_built(monkeypatch, there):
    monkeypatch.setattr(cpu, "available", lambda: there)
    assert choose_search(12, 256, 16) == ("cpu" if there else "jax")


def test_streams_without_room_name_the_fix():
    target, weight, table = problem(12, 4096, 1)
    with pytest.raises(NotImplementedError, match="17 MiB of VMEM.*set fewer stream_rows"):
        tpu.tail_biting(target, weight, table, 2, (48, 48))
    with pytest.raises(NotImplementedError, match="set window_bits to at most 14"):
        gpu.tail_biting(target, weight, jnp.zeros(2**15), 2, (64, 64))
    with pytest.raises(NotImplementedError, match="search fewer streams at once"):
        gpu.check(14, 4096, 64)
