"""Runs Flax models from trees with packed kernels, and makes these dense again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from gptvq_jax.flax_tree.interpret import Reader, interpret, weight_of
from gptvq_jax.flax_tree.kernel import PackedKernel, is_packed
from gptvq_jax.flax_tree.models import as_function
from gptvq_jax.ops.vq_matmul import VQKernel, check_implementation, make_kernel


def packed(model: Any, implementation: str = "auto") -> Callable[..., Any]:
    """A model that takes trees with packed kernels, and reads them packed.

    Every `dot_general`, einsum and convolution that reads one is a product with its codes
    (`gptvq_jax.ops.vq_matmul`), whatever module it is in. Where something else reads one, it is
    dequantized there, and a line of the log says so.

    Args:
      model: a Linen module, an NNX module, or any function that jax.jit could take.
      implementation: of products, see `gptvq_jax.ops.vq_matmul`.

    Returns:
      A function of (variables, *inputs, **options): of a Linen module its `apply`, of an NNX
      module its `__call__` with a state. It is traced at every call, so put it into jax.jit.

    Raises:
      ValueError: the model is none of these, or there is no such implementation.
    """
    function = as_function(model)
    check_implementation(implementation)

    def run(*args, **options):
        leaves = jax.tree.leaves((args, options), is_leaf=is_packed)
        kernels = {i: leaf for i, leaf in enumerate(leaves) if is_packed(leaf)}
        weights = {i: weight_of(str(i), kernel) for i, kernel in kernels.items()}
        reader = _Runner({str(i): kernel for i, kernel in kernels.items()}, implementation)
        call = lambda args, options: function(*args, **options)  # noqa: E731
        return interpret(call, (args, options), weights, reader)

    return run


def ready(tree: Any, implementation: str = "auto") -> Any:
    """The tree in the layout that an implementation reads, which some work out at every call.

    It is for running alone: neither stored nor dequantized.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: the one that is named does not support a tensor or this platform.
    """
    return _map(tree, lambda kernel: kernel.ready(implementation))


def dequantize(tree: Any) -> Any:
    """The tree with the dense kernels that its packed ones stand for, as the float model has."""
    return _map(tree, PackedKernel.dequantize)


def bits_per_value(tree: Any) -> float:
    """8 x the bytes of all packed kernels / their weights.

    Raises:
      ValueError: there are none.
    """
    kernels = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(leaf)]
    values = sum(kernel.num_values for kernel in kernels)
    if not values:
        raise ValueError("the tree has no packed kernels; pass what gptvq_jax.quantize returned")
    return 8 * sum(kernel.num_bytes for kernel in kernels) / values


def _map(tree: Any, change: Callable[[PackedKernel], Any]) -> Any:
    leaf = lambda leaf: change(leaf) if is_packed(leaf) else leaf  # noqa: E731
    return jax.tree.map(leaf, tree, is_leaf=is_packed)


class _Runner(Reader):
    """Multiplies by packed matrices."""

    def __init__(self, kernels: dict[str, PackedKernel], implementation: str):
        self._kernels, self._implementation = kernels, implementation

    def kernel(self, name):
        return self._kernels[name].dequantize()

    def product(self, product, dense):
        kernel = self._kernels[product.weight.name]
        if product.layout != kernel.layout:
            self.other(product.weight, "a product over other axes")
            return dense()
        x = product.rows().astype(product.dtype)
        rows = [
            row @ self._matrix(kernel.tensors[index])
            for row, index in zip(x, product.indices(), strict=True)
        ]
        return product.result(jnp.stack(rows))

    def other(self, weight, what):
        shape = "x".join(map(str, weight.shape))
        logging.info("a packed kernel of %s is dequantized: %s reads it", shape, what)

    def _matrix(self, tensor) -> VQKernel:
        if isinstance(tensor, VQKernel):
            return tensor
        return make_kernel(tensor, self._implementation)
