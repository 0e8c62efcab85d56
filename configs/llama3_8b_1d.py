"""Llama-3-8B, GPTVQ 1D: a row of the paper's Table 2.

  python scripts/quantize.py --config=configs/llama3_8b_1d.py:2.125b --config.model=DIR_OR_HUB_NAME

Bits per value: 2.125b, 2.25b, 3.125b, 4.125b.
The paper's WikiText-2 perplexity at these bits: 15.9 / 14.1 / 7.29 / -
(arXiv 2402.15319, Table 2, context 2048).
This code has not run it yet.
"""

from gptvq_jax.paper import table2_config


def get_config(arg: str = "2.125b"):
    return table2_config("meta-llama/Meta-Llama-3-8B", dim=1, bits=arg)
