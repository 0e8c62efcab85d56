"""Flax models of any kind, quantized layer by layer and run from packed kernels (docs/flax_models.md).

`gptvq_jax.quantize(model, calibration, rules)` makes a tree with packed kernels, and
`gptvq_jax.packed(model)` runs the model from one. The rest is here.
"""

from gptvq_jax.flax_tree.kernel import Layout, PackedKernel
from gptvq_jax.flax_tree.packed import bits_per_value, dequantize, packed, ready
from gptvq_jax.flax_tree.quantize_tree import quantize_tree
from gptvq_jax.flax_tree.tree_files import load, save

__all__ = [
    *("Layout", "PackedKernel", "bits_per_value", "dequantize", "load", "packed"),
    *("quantize_tree", "ready", "save"),
]
