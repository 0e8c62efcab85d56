"""Flax models of any kind: quantized layer by layer, and run from packed kernels.

`gptvq_jax.quantize(model, calibration, rules)` makes a tree with packed kernels, `gptvq_jax.packed`
runs the model from it. What else there is to do with such a tree is here; docs/flax_models.md.
"""

from gptvq_jax.flax_tree.kernel import PackedKernel
from gptvq_jax.flax_tree.quantize_tree import quantize_tree
from gptvq_jax.flax_tree.run_packed import bits_per_value, dequantize, packed, ready
from gptvq_jax.flax_tree.tree_files import load, save

__all__ = [
    "PackedKernel",
    "bits_per_value",
    "dequantize",
    "load",
    "packed",
    "quantize_tree",
    "ready",
    "save",
]
