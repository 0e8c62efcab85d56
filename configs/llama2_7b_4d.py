"""Llama-2-7B, GPTVQ 4D: a row of the paper's Table 2.

  python scripts/quantize.py --config=configs/llama2_7b_4d.py:2.125b --config.model=DIR_OR_HUB_NAME

Bits per value: 2.125b, 2.25b.
The paper's WikiText-2 perplexity at these bits: 7.18 / 6.99
(arXiv 2402.15319, Table 2, context 2048; one H100: 0.5 to 1 h (4D 2.5 h)).
This code has not run it yet.
"""

from gptvq_jax.paper import table2_config


def get_config(arg: str = "2.125b"):
    return table2_config("meta-llama/Llama-2-7b-hf", dim=4, bits=arg)
