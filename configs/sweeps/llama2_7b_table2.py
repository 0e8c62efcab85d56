"""Llama-2-7B, all cells of the paper's Table 2: 1D, 2D and 4D at each of its bits per value.

  python scripts/sweep.py --config=configs/sweeps/llama2_7b_table2.py --config.base.model=DIR --plan
  python scripts/sweep.py --config=configs/sweeps/llama2_7b_table2.py --config.base.model=DIR

A cell is a config of configs/ with its argument, as in llama2_7b_2d.py:2.125b; the published
perplexities are in their docstrings and in docs/sweeps.md. This code has not run it yet.
"""

from gptvq_jax.paper import GROUP_SIZES
from gptvq_jax.study.sweep.axes import configs, sweep


def get_config():
    rows = {f"{dim}d_{bits}": f"llama2_7b_{dim}d:{bits}" for dim, bits in GROUP_SIZES}
    return sweep("llama2_7b_table2", "llama2_7b_2d:2.125b", axes=[configs("row", rows)])
