"""Mistral-7B-v0.1, GPTVQ 2D: a row of the paper's Table 2.

  python scripts/quantize.py --config=configs/mistral_7b_2d.py:2.125b --config.model=DIR_OR_HUB_NAME

Bits per value: 2.125b, 2.25b, 3.125b, 4.125b.
The paper's WikiText-2 perplexity at these bits: 7.53 / 7.24 / 5.51 / 5.32
(arXiv 2402.15319, Table 2, context 2048).
This code has not run it yet.
"""

from gptvq_jax.paper import table2_config


def get_config(arg: str = "2.125b"):
    return table2_config("mistralai/Mistral-7B-v0.1", dim=2, bits=arg)
