"""A kernel as the program sees it: which axes of the stored array an axis of the view is made of.

Between a parameter and the product that reads it, models reshape and transpose. As long as no value
moves to a place of its own, every axis of the result is a product of factors of the kernel's axes,
and a contraction of axes of the result is one of axes of the kernel.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax


class Factor(NamedTuple):
    """Part of an axis of the kernel: its index is sum of stride * index over the axis' factors."""

    axis: int
    stride: int
    size: int


Axis = tuple[Factor, ...]  # of a view, its factors row-major; of size 1: none


class View(NamedTuple):
    """Factors of every axis; those that are fixed belong to a slice, at these indices."""

    axes: tuple[Axis, ...]
    fixed: tuple[tuple[Factor, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size_of(axis) for axis in self.axes)

    def reshaped(self, shape: Sequence[int]) -> "View | None":
        """The view in another shape of as many values; None where an axis would be no product."""
        left = [factor for axis in self.axes for factor in axis]
        axes = []
        for size in shape:
            axis = []
            while size > 1:
                factor = left.pop(0)
                if factor.size > size and factor.size % size == 0:
                    inner = factor.size // size
                    left.insert(0, factor._replace(size=inner))
                    factor = factor._replace(stride=factor.stride * inner, size=size)
                if size % factor.size:
                    return None
                axis.append(factor)
                size //= factor.size
            axes.append(tuple(axis))
        return self._replace(axes=tuple(axes))

    def transposed(self, permutation: Iterable[int]) -> "View":
        return self._replace(axes=tuple(self.axes[axis] for axis in permutation))

    def broadcast(self, shape: Sequence[int], places: Sequence[int]) -> "View | None":
        """With more axes, of size 1; None where one of them is longer."""
        axes: list[Axis] = [()] * len(shape)
        for place, axis in zip(places, self.axes, strict=True):
            axes[place] = axis
        view = self._replace(axes=tuple(axes))
        return view if view.shape == tuple(shape) else None

    def at(self, index: int) -> "View":
        """The slice at an index of the first axis."""
        fixed = list(self.fixed)
        for factor in reversed(self.axes[0]):
            fixed.append((factor, index % factor.size))
            index //= factor.size
        return View(self.axes[1:], tuple(fixed))

    def read(self, kernel: jax.Array) -> jax.Array:
        """The values that the view has of a kernel."""
        at = dict(self.fixed)
        inside = in_order([*at, *(factor for axis in self.axes for factor in axis)])
        kernel = kernel.reshape([factor.size for factor in inside])
        kernel = kernel[tuple(at.get(factor, slice(None)) for factor in inside)]
        left = [factor for factor in inside if factor not in at]
        order = [left.index(factor) for axis in self.axes for factor in axis]
        return kernel.transpose(order).reshape(self.shape)


def whole(shape: Sequence[int]) -> View:
    """All of a kernel, as it is stored."""
    return View(tuple((Factor(axis, 1, n),) if n > 1 else () for axis, n in enumerate(shape)))


def size_of(axis: Axis) -> int:
    return math.prod(factor.size for factor in axis)


def in_order(factors: Iterable[Factor]) -> list[Factor]:
    """As the kernel has them, row-major."""
    return sorted(factors, key=lambda factor: (factor.axis, -factor.stride))
