"""The Viterbi search against every stream there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.trellis_table import gaussian_values
from gptvq_jax.moves.viterbi import search_streams, tail_biting, viterbi
from gptvq_jax.ops.cpu import viterbi as cpu_viterbi

# (L, K, T) of at most 2^14 streams.
SHORT = [(4, 1, 8), (4, 2, 5), (4, 3, 4), (4, 4, 3), (5, 1, 9), (5, 2, 5), (5, 3, 4), (6, 2, 5)]


def problem(bits, rows, streams=1, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(streams, rows)).astype(np.float32)
    weight = rng.uniform(0.2, 2, size=(streams, rows)).astype(np.float32)
    return target, weight, gaussian_values(bits)


def windows_of(codes, bits, rate, after=0):
    """Windows (T,) of a stream given as codes; `after` are the bits behind its last one."""
    number = sum(int(code) << rate * i for i, code in enumerate(codes))
    number |= int(after) << rate * len(codes)
    return [(number >> rate * i) % 2**bits for i in range(len(codes))]


def every_stream(bits, rate, rows, biting):
    """(first L - K bits, windows) of all streams, which bite their tails or go on freely."""
    free = bits - rate
    for codes in itertools.product(range(2**rate), repeat=rows):
        number = sum(code << rate * i for i, code in enumerate(codes))
        first = number % 2**free
        for after in [first] if biting else range(2**free):
            yield first, windows_of(codes, bits, rate, after)


def losses(windows, target, weight, table):
    return np.sum(weight * (target - table[np.asarray(windows)]) ** 2, axis=-1, dtype=np.float64)


@pytest.mark.parametrize(("bits", "rate", "rows"), SHORT)
def test_a_free_search_finds_the_best_of_all_streams(bits, rate, rows):
    rows = min(rows, 12 // rate - (bits - rate) // rate)
    target, weight, table = problem(bits, rows)
    found, loss = viterbi(target, weight, table, rate)
    every = np.array([w for _, w in every_stream(bits, rate, rows, biting=False)])
    best = losses(every, target, weight, table).min()
    assert found[0].tolist() in every.tolist()
    np.testing.assert_allclose(losses(found, target, weight, table), best, rtol=1e-5)
    np.testing.assert_allclose(loss, best, rtol=1e-5)


@pytest.mark.parametrize(("bits", "rate", "rows"), SHORT)
def test_given_its_overlap_the_best_of_all_streams_that_bite_their_tails(bits, rate, rows):
    target, weight, table = problem(bits, rows, seed=1)
    firsts, every = zip(*every_stream(bits, rate, rows, biting=True), strict=True)
    loss = losses(np.array(every), target, weight, table)
    overlaps = np.unique(firsts)
    count = len(overlaps)
    repeated = (np.repeat(x, count, axis=0) for x in (target, weight))
    found, least = viterbi(*repeated, table, rate, jnp.asarray(overlaps, jnp.int32))
    for i, overlap in enumerate(overlaps):
        assert found[i].tolist() in np.array(every)[np.array(firsts) == overlap].tolist()
        np.testing.assert_allclose(least[i], loss[np.array(firsts) == overlap].min(), rtol=1e-5)
    chosen, own = tail_biting(target, weight, table, rate)
    assert chosen[0].tolist() in np.array(every).tolist()
    # The overlap comes from a search around the cut: often the best one, and never a wrong one.
    at = list(overlaps).index(int(chosen[0, 0]) % 2 ** (bits - rate))
    np.testing.assert_allclose(own[0], least[at], rtol=1e-5)


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_the_overlap_of_a_long_stream_is_often_the_best_one_and_never_far_from_it(rate):
    bits, count = 5, 2 ** (5 - rate)
    target, weight, table = problem(bits, 40, streams=30, seed=2)
    _, loss = tail_biting(target, weight, table, rate)
    tried = [
        viterbi(target, weight, table, rate, jnp.full(30, overlap))[1] for overlap in range(count)
    ]
    best = np.min(tried, axis=0)
    assert np.all(loss >= best * (1 - 1e-5))
    assert np.mean(loss <= best * (1 + 1e-5)) > 0.5
    assert np.mean(loss) < 1.03 * np.mean(best)
    assert np.mean(best) < np.mean(tried)


def test_more_memory_codes_a_gaussian_better_at_the_same_rate():
    errors = []
    for bits in (4, 7, 10):
        target, _, table = problem(bits, 128, streams=8, seed=3)
        found, _ = tail_biting(target, np.ones_like(target), table, 2)
        errors.append(np.mean((target - table[found]) ** 2))
    assert errors[0] > 1.1 * errors[1] > 1.1**2 * errors[2] > 1.1**2 / 16
    assert errors[2] < 1.2 / 16  # the least that any code of 2 bits reaches is 1 / 16


@pytest.mark.parametrize("bits", [4])
def test_a_rate_that_is_found_out_in_the_program_is_that_of_the_search(bits):
    target, weight, table = problem(bits, 16, streams=3, seed=4)
    run = jax.jit(search_streams)
    for rate in range(min(6, bits) + 1):
        windows, loss = run(target, weight, table, jnp.int32(rate))
        if rate == 0:
            assert not np.any(windows) and not np.any(loss)
            continue
        expected, least = tail_biting(target, weight, table, rate)
        np.testing.assert_array_equal(windows, expected)
        np.testing.assert_allclose(loss, least, rtol=1e-6)


@pytest.mark.skipif(not cpu_viterbi.available(), reason="no C++ compiler, or no CPU")
@pytest.mark.parametrize(("bits", "rows"), [(4, 5), (7, 40)])
def test_the_kernel_finds_the_same_streams(bits, rows):
    target, weight, table = problem(bits, rows, streams=3, seed=5)
    weight[1, 2:4] = 0  # outliers
    assert not np.any(search_streams(target, weight, table, jnp.int32(0), native="cpu")[0])
    for rate in (1, 2, 4) if bits == 4 else (1, 3, 6):
        windows, loss = search_streams(target, weight, table, jnp.int32(rate), native="cpu")
        expected, least = tail_biting(target, weight, table, rate)
        np.testing.assert_allclose(loss, least, rtol=1e-5)
        own = losses(windows, target, weight, table), losses(expected, target, weight, table)
        np.testing.assert_allclose(*own, rtol=1e-5)
        assert np.mean(windows == expected) > 0.95  # of equal costs one or the other is kept
        cuts = jnp.array([0, 1, 3]) % (len(table) >> rate)
        windows, loss = search_streams(target, weight, table, jnp.int32(rate), cuts, native="cpu")
        expected, least = viterbi(target, weight, table, rate, cuts)
        np.testing.assert_allclose(loss, least, rtol=1e-5)
        np.testing.assert_array_equal(windows[:, 0] % (len(table) >> rate), cuts)
        assert np.mean(windows == expected) > 0.95


@pytest.mark.skipif(not cpu_viterbi.available(), reason="no C++ compiler, or no CPU")
def test_the_kernel_refuses_what_does_not_fit():
    target, weight, table = problem(4, 8)
    for args in [
        (target, weight, table, jnp.int32(7)),
        (target, weight[:, :-1], table, jnp.int32(1)),
        (target, weight, table[:-1], jnp.int32(1)),
        (target[:, :3], weight[:, :3], table, jnp.int32(1)),
    ]:
        with pytest.raises(Exception, match="do not fit"):
            jax.block_until_ready(search_streams(*args, native="cpu"))
