"""The layers of a model: the parameters that products alone read, found in its program."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptvq_jax.flax_tree.interpret import Reader, interpret, weight_of
from gptvq_jax.flax_tree.kernel import Layout
from gptvq_jax.flax_tree.models import layer_name, named_leaves
from gptvq_jax.flax_tree.products import Product, Weight

_PRODUCTS = ("dot_general", "conv_general_dilated")


class Layer(NamedTuple):
    """A kernel that products read, all in one way."""

    name: str
    place: int  # among the leaves of the tree
    layout: Layout
    group: int  # layers that read one array are of a group, numbered as the program comes to them


class Found(NamedTuple):
    """What a program does with the parameters that have two axes or more."""

    layers: dict[str, Layer]  # in the order in which the program reads them
    passed_over: dict[str, str]  # {name: why it is no layer}
    multiplied: set[str]  # those of them that products read, too
    unread: list[str]


def find_layers(function: Callable[..., Any], tree: Any, inputs: tuple[Any, ...]) -> Found:
    """Looks through the program of function(tree, *inputs); nothing is computed.

    Raises:
      What the function raises for such inputs.
    """
    weights = candidates(tree)
    finder = _Finder()

    def trace(tree, inputs):
        finder.kernels = {w.name: jax.tree.leaves(tree)[i] for i, w in weights.items()}
        return interpret(function, (tree, *inputs), weights, finder)

    jax.eval_shape(trace, tree, inputs)
    places = {weight.name: place for place, weight in weights.items()}
    layers = {
        name: Layer(name, places[name], layout, finder.groups[name])
        for name, layout in finder.layouts.items()
        if name not in finder.why_not
    }
    unread = [name for name in places if name not in {*layers, *finder.why_not}]
    return Found(layers, finder.why_not, finder.multiplied & finder.why_not.keys(), unread)


def candidates(tree: Any) -> dict[int, Weight]:
    """{number of the leaf: weight} of the leaves that may be kernels."""
    return {
        place: weight_of(layer_name(name), leaf)
        for place, (name, leaf) in enumerate(named_leaves(tree))
        if getattr(leaf, "ndim", 0) > 1
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and math.prod(leaf.shape) > 0
    }


class _Finder(Reader):
    """Notes who reads what."""

    def __init__(self):
        self.kernels: dict[str, jax.Array] = {}
        self.layouts: dict[str, Layout] = {}
        self.groups: dict[str, int] = {}
        self.why_not: dict[str, str] = {}
        self.multiplied: set[str] = set()
        self._read: list[jax.Array] = []  # kept, so that `is` tells them apart

    def kernel(self, name):
        return self.kernels[name]

    def product(self, product, dense):
        name, layout = product.weight.name, product.layout
        self.multiplied.add(name)
        if self.layouts.setdefault(name, layout) != layout:
            self.why_not[name] = "its products contract different axes"
        self.groups.setdefault(name, self._group(product))
        return dense()

    def other(self, weight, what):
        self.why_not.setdefault(weight.name, f"{what} reads it, not a product alone")
        if what in _PRODUCTS:
            self.multiplied.add(weight.name)

    def _group(self, product: Product) -> int:
        for number, x in enumerate(self._read):
            if x is product.x:
                return number
        self._read.append(product.x)
        return len(self._read) - 1
