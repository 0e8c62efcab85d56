"""Weights on huge pages are the same arrays, side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import random_tensor

from gptvq_jax.ops.vq_matmul import make_kernel
from gptvq_jax.serve.huge_pages import on_huge_pages

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")


def _pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_arrays_are_moved_side_by_side():
    sizes, dtypes = (3, 1 << 19, 777, 1 << 17), ("uint8", "float32", "float16", "bfloat16")
    before = {
        name: jnp.asarray(np.random.default_rng(size).integers(0, 100, size), name)
        for size, name in zip(sizes, dtypes, strict=True)
    }
    after = on_huge_pages(dict(before))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        np.testing.assert_array_equal(after[name], array)
    starts = _pointers(after)
    assert set(starts).isdisjoint(_pointers(before))
    assert starts[0] % (2 << 20) == 0
    ends = [
        start + -(-leaf.nbytes // 64) * 64
        for start, leaf in zip(starts, jax.tree.leaves(after), strict=True)
    ]
    assert starts[1:] == ends[:-1]


def test_a_small_tree_stays():
    tree = {"a": jnp.ones(1000), "b": [jnp.zeros((2, 3))]}
    assert _pointers(on_huge_pages(tree)) == _pointers(tree)


def test_what_was_moved_outlives_the_tree():
    moved = on_huge_pages([jnp.full(1 << 20, 7.0), jnp.full(1 << 20, 8.0)])
    second = moved[1]
    del moved
    assert float(second.sum()) == 8.0 * (1 << 20)


def test_a_program_reads_packed_weights_there():
    kernel = jax.tree.map(jnp.asarray, make_kernel(random_tensor("int8", 64, 64, 0), "xla"))
    large = jnp.zeros(1 << 20)
    moved = on_huge_pages({"kernel": kernel, "large": large})
    x = jnp.ones((1, 64))
    np.testing.assert_array_equal(x @ moved["kernel"], x @ kernel)
    assert set(_pointers(moved["kernel"])).isdisjoint(_pointers(kernel))
