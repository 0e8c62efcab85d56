"""OLMo-3-7B, GPTVQ 2D, with the protocol of GPTVQ's Table 2.

  python scripts/quantize.py --config=configs/olmo3_7b_2d.py:2.125b --config.model=DIR_OR_HUB_NAME

Bits per value: 2.125b, 2.25b, 3.125b, 4.125b. Windows of 4096 tokens are longer than the context.
This code has not run it yet.
"""

from gptvq_jax.paper import table2_config


def get_config(arg: str = "2.125b"):
    return table2_config("allenai/Olmo-3-1025-7B", dim=2, bits=arg)
