"""Mixtral-8x7B, GPTVQ 2D, with the protocol of the paper's Table 2.

  python scripts/quantize.py --config=configs/mixtral_8x7b_2d.py:2.125b --config.model=DIR

Bits per value: 2.125b, 2.25b, 3.125b, 4.125b. Every expert is quantized under the Hessian of the
tokens that it gets; the router stays dense.
This code has not run it yet.
"""

from gptvq_jax.paper import table2_config


def get_config(arg: str = "2.125b"):
    return table2_config("mistralai/Mixtral-8x7B-v0.1", dim=2, bits=arg)
