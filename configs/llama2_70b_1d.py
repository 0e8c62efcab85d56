"""Llama-2-70B, GPTVQ 1D: a row of the paper's Table 2.

  python scripts/quantize.py --config=configs/llama2_70b_1d.py:2.125b --config.model=DIR_OR_HUB_NAME

Bits per value: 2.125b, 2.25b, 3.125b, 4.125b.
The paper's WikiText-2 perplexity at these bits: 5.03 / 4.85 / 3.64 / 3.39
(arXiv 2402.15319, Table 2, context 2048; one H100: 3 to 11 h).
This code has not run it yet.
"""

from gptvq_jax.paper import table2_config


def get_config(arg: str = "2.125b"):
    return table2_config("meta-llama/Llama-2-70b-hf", dim=1, bits=arg)
