"""Several at once: the order, errors and bits of a loop."""

import threading

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.hessian import factorize
from gptvq_jax.methods import gptvq_settings, pool
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.methods.layer import Objective, Problem, quantize_layers
from gptvq_jax.methods.pool import parallel
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.uniform import UniformSettings

pytestmark = [
    pytest.mark.usefixtures("short_programs"),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU has workers"),
]


@pytest.fixture
def use_workers(monkeypatch):
    """Sets how many cores there are."""

    def use(count):
        monkeypatch.setattr(pool, "num_workers", lambda: count)
        pool._pool.cache_clear()

    yield use
    pool._pool.cache_clear()


def test_two_at_once_in_order(use_workers):
    """Each waits for the other of its pair, and the later one of a pair is done first."""
    use_workers(2)
    met = [threading.Barrier(2, timeout=60) for _ in range(4)]
    done = [threading.Event() for _ in range(8)]

    def function(item):
        met[item // 2].wait()
        if item % 2 == 0:
            assert done[item + 1].wait(60)
        done[item].set()
        return item, threading.current_thread().name

    results = parallel(function, iter(range(8)))
    assert [item for item, _ in results] == list(range(8))
    names = {name for _, name in results}
    assert len(names) == 2 and all(name.startswith("layers") for name in names)


@pytest.mark.parametrize("workers, count", [(1, 5), (2, 1), (2, 0)])
def test_alone_it_is_the_loop(use_workers, workers, count):
    use_workers(workers)
    results = parallel(lambda item: (item, threading.current_thread()), range(count))
    assert results == [(item, threading.current_thread()) for item in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_comes_through(use_workers, workers):
    use_workers(workers)

    def function(item):
        if item in (3, 5):
            raise ValueError(f"item {item}")
        return jnp.full(3, item)

    with pytest.raises(ValueError, match="^item 3$"):
        parallel(function, range(8))
    np.testing.assert_array_equal(parallel(function, range(3)), [[0] * 3, [1] * 3, [2] * 3])


def problems():
    """Layers of every method, of one in parts, and of one in row groups."""
    gptvq_settings = GPTVQSettings(
        bits=2.0, group_size=256, max_group_cols=16, em_iterations=3, polish_rounds=2
    )
    aqlm_settings = AQLMSettings(code_bits=3, dim=4, em_iterations=2, rounds=2, block_size=16)
    for seed, (rows, groups, method, settings) in enumerate(
        [
            (64, 1, "gptvq", gptvq_settings),
            (32, 2, "gptvq", gptvq_settings),
            (48, 1, "aqlm", aqlm_settings),
            (64, 1, "gptq", UniformSettings(bits=2, group_size=8)),
        ]
    ):
        objectives = []
        for k in range(groups):
            hessian = jnp.asarray(ref.problem(1, 32, seed=10 * seed + k).hessian)
            shift = 0.1 * jnp.asarray(ref.problem(rows // groups, 32, seed=k).weight) @ hessian
            objectives.append(Objective(hessian, factorize(hessian, 0.01), shift))
        weight = jnp.asarray(ref.problem(rows, 32, seed=seed).weight)
        key = jax.random.key(seed)
        yield Problem(METHODS[method].quantize, settings, weight, objectives, key, 0.5)


def test_layers_are_the_same_with_any_number_of_workers(use_workers, monkeypatch):
    monkeypatch.setattr(gptvq_settings, "_PART_ROWS", 16)
    found = []
    for workers in (1, 2):
        use_workers(workers)
        found.append([jax.tree.leaves(tensor) for tensor in quantize_layers(list(problems()))])
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_error_of_a_layer_names_it(use_workers):
    use_workers(2)
    good = list(problems())
    bad = good[1]._replace(weight=good[1].weight * 1e30, name="layers_3/mlp/up_proj")
    with pytest.raises(ValueError, match="^layers_3/mlp/up_proj holds .*e.30, too large"):
        quantize_layers([good[0], bad, good[3]])
