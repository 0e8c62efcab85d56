"""Views against NumPy: what renames axes may be undone from the factors alone."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptvq_jax.flax_tree.view import whole

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def cut(draw, size: int) -> tuple[int, ...]:
    """Some factors of a size, in some order."""
    sizes = []
    while size > 1 and draw(st.booleans()):
        part = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        sizes.append(part)
        size //= part
    return (*sizes, size)


@given(shape=SHAPES, data=st.data())
def test_a_view_reads_what_numpy_gives(shape, data):
    kernel = np.arange(math.prod(shape))
    expected, view = kernel.reshape(shape), whole(shape)
    for _ in range(3):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(expected.ndim)))
            expected, view = expected.transpose(order), view.transposed(order)
        sizes = cut(data.draw, expected.size)
        new = view.reshaped(sizes)
        if new is not None:
            expected, view = expected.reshape(sizes), new
        if view.shape[0] > 1 and data.draw(st.booleans()):
            index = data.draw(st.integers(0, len(expected) - 1))
            expected, view = expected[index], view.at(index)
        if not view.axes:
            break
    assert view.shape == expected.shape
    np.testing.assert_array_equal(view.read(kernel.reshape(shape)), expected)


def test_axes_merge_and_split():
    view = whole((6, 4)).reshaped((24,))
    assert view.reshaped((2, 3, 4)).axes == view.reshaped((2, 12)).reshaped((2, 3, 4)).axes
    assert view.reshaped((6, 4)) == whole((6, 4))


def test_an_axis_of_parts_that_are_no_factors_is_refused():
    assert whole((2, 3)).transposed((1, 0)).reshaped((6,)).reshaped((2, 3)) is None
    assert whole((4, 3)).reshaped((3, 4)) is None


def test_broadcasting_adds_axes_of_size_1_alone():
    view = whole((2, 3))
    assert view.broadcast((2, 1, 3), (0, 2)).shape == (2, 1, 3)
    assert view.broadcast((5, 2, 3), (1, 2)) is None
    assert whole((1, 3)).broadcast((4, 3), (0, 1)) is None
