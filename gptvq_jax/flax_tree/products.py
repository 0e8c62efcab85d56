"""A product with one weight, as rows times matrices: x (B, N, C) and W (B, R, C) -> (B, N, R).

`dot_general` may contract any axes of a weight, keep any as batch, and have it on either side; a
convolution is the product with the patches of its input.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptvq_jax.flax_tree.kernel import Layout
from gptvq_jax.flax_tree.view import Factor, View, in_order


@dataclasses.dataclass(frozen=True)
class Weight:
    """A kernel in the program, seen through what has been done to it since."""

    name: str
    shape: tuple[int, ...]  # of the kernel
    view: View
    dtype: Any


def is_weight(value: Any) -> bool:
    return isinstance(value, Weight)


@dataclasses.dataclass(frozen=True)
class Product:
    """One product with a weight.

    Args:
      weight: what is contracted.
      x: the other operand.
      contracted, batch: axes of x and of the weight's view, in pairs.
      weight_first: whether it stands on the left.
      dtype: of the result.
      last_to: where the result has its last axis in the end.
    """

    weight: Weight
    x: jax.Array
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    weight_first: bool
    dtype: Any
    last_to: int = -1

    @property
    def layout(self) -> Layout | None:
        """What the product makes of the kernel's axes; None where it splits one."""
        fixed = [factor for factor, _ in self.weight.view.fixed]
        groups = [[*fixed, *self._of_batch], self._inputs, self._outputs]
        batch, inputs, outputs = ({factor.axis for factor in group} for group in groups)
        if batch & inputs or batch & outputs or inputs & outputs:
            return None
        return Layout(self.weight.shape, tuple(sorted(batch)), tuple(sorted(inputs)))

    def rows(self) -> jax.Array:
        """x as (B, N, C), its columns in the order of the kernel's axes."""
        wanted = {axis: self._factors([w]) for axis, w in zip(*self.contracted, strict=True)}
        wanted |= {axis: self._factors([w]) for axis, w in zip(*self.batch, strict=True)}
        sizes, places, free = [], {}, []
        for axis, size in enumerate(self.x.shape):
            if axis in wanted:
                for factor in wanted[axis]:
                    places[factor] = len(sizes)
                    sizes.append(factor.size)
            else:
                free.append(len(sizes))
                sizes.append(size)
        batch = [places[factor] for factor in in_order(self._of_batch)]
        inputs = [places[factor] for factor in in_order(self._inputs)]
        x = self.x.reshape(sizes).transpose(*batch, *free, *inputs)
        counts = (math.prod(sizes[i] for i in group) for group in (batch, free, inputs))
        return x.reshape(*counts)

    def indices(self) -> list[int]:
        """Which of the kernel's matrices each of the B is."""
        layout, factors = self.layout, in_order(self._of_batch)
        found = []
        for index in np.ndindex(*(factor.size for factor in factors)):
            place = dict.fromkeys(layout.batch_axes, 0)
            for factor, i in (*zip(factors, index, strict=True), *self.weight.view.fixed):
                place[factor.axis] += factor.stride * i
            number = 0
            for axis in layout.batch_axes:
                number = number * layout.shape[axis] + place[axis]
            found.append(number)
        return found

    def result(self, rows: jax.Array) -> jax.Array:
        """What the program expects, of x W^T (B, N, R)."""
        batch, outputs = in_order(self._of_batch), in_order(self._outputs)
        free = [n for axis, n in enumerate(self.x.shape) if axis not in self._taken]
        sizes = [*(f.size for f in batch), *free, *(f.size for f in outputs)]
        first_free, first_out = len(batch), len(batch) + len(free)
        to_batch = [batch.index(factor) for factor in self._of_batch]
        to_free = list(range(first_free, first_out))
        to_out = [first_out + outputs.index(factor) for factor in self._outputs]
        sides = (to_out, to_free) if self.weight_first else (to_free, to_out)
        y = rows.reshape(sizes).transpose(*to_batch, *sides[0], *sides[1])
        view = self.weight.view
        shape = [self.x.shape[axis] for axis in self.batch[0]]
        out = [view.shape[axis] for axis in self._out_axes]
        shape += [*out, *free] if self.weight_first else [*free, *out]
        return jnp.moveaxis(y.reshape(shape), -1, self.last_to).astype(self.dtype)

    @property
    def _taken(self) -> set[int]:
        return {*self.contracted[0], *self.batch[0]}

    @property
    def _out_axes(self) -> list[int]:
        taken = {*self.contracted[1], *self.batch[1]}
        return [axis for axis in range(len(self.weight.view.axes)) if axis not in taken]

    def _factors(self, axes: Sequence[int]) -> list[Factor]:
        return [factor for axis in axes for factor in self.weight.view.axes[axis]]

    @property
    def _inputs(self) -> list[Factor]:
        return self._factors(self.contracted[1])

    @property
    def _of_batch(self) -> list[Factor]:
        return self._factors(self.batch[1])

    @property
    def _outputs(self) -> list[Factor]:
        return self._factors(self._out_axes)


def of_dot_general(left: Any, right: Any, params: dict[str, Any], dtype: Any) -> Product:
    """The product of an operand that is a Weight with one that is not."""
    (left_in, right_in), (left_batch, right_batch) = params["dimension_numbers"]
    if is_weight(left):
        contracted, batch = (right_in, left_in), (right_batch, left_batch)
        return Product(left, right, contracted, batch, True, dtype)
    return Product(right, left, (left_in, right_in), (left_batch, right_batch), False, dtype)


def of_convolution(
    x: jax.Array, weight: Weight, params: dict[str, Any], dtype: Any
) -> Product | None:
    """The product with patches of x.

    None for groups of channels, of which each has a small product of its own.
    """
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    _, channels, *window = numbers.rhs_spec
    shape = weight.view.shape
    patches = lax.conv_general_dilated_patches(
        x,
        [shape[axis] for axis in window],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=numbers,
        precision=lax.Precision.HIGHEST,  # they are copies: nothing may be rounded
    )
    patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    axes = (channels, *window)
    patches = patches.reshape(*patches.shape[:-1], *(shape[axis] for axis in axes))
    last = tuple(range(patches.ndim - len(axes), patches.ndim))
    return Product(weight, patches, (last, axes), ((), ()), False, dtype, numbers.out_spec[1])
