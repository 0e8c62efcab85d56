"""Qwen3-30B-A3B, GPTVQ 2D, with the protocol of GPTVQ's Table 2.

  python scripts/quantize.py --config=configs/qwen3_30b_a3b_2d.py:2.125b --config.model=DIR

Bits per value: 2.125b, 2.25b, 3.125b, 4.125b. Each of the 128 experts of a block gets one token in
16: calibration.expert_tokens says what is done about those that get too few.
This code has not run it yet.
"""

from gptvq_jax.paper import table2_config


def get_config(arg: str = "2.125b"):
    return table2_config("Qwen/Qwen3-30B-A3B-Base", dim=2, bits=arg)
