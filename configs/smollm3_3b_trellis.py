"""SmolLM3-3B, trellis codes with a rate for every column, on the texts of GPTVQ's Table 2.

  python scripts/quantize.py --config=configs/smollm3_3b_trellis.py:2.125b --config.model=DIR

Any number of true bits per value, as in 2.5b, is the budget of all layers together.
This code has not run it yet.
"""

from gptvq_jax.paper import trellis_protocol


def get_config(arg: str = "2.125b"):
    return trellis_protocol("HuggingFaceTB/SmolLM3-3B-Base", arg)
