"""Mistral-7B, AQLM with block tuning.

  python scripts/quantize.py --config=configs/mistral_7b_aqlm.py:1x16 --config.model=DIR_OR_HUB_NAME

A code is MxBgD: M codebooks of B-bit codes for D weights (8 if not said). 1x16 and 2x8 take 2 bits
per weight for the codes, 2x12 takes 3.
This code has not run it yet.
"""

from gptvq_jax.paper import aqlm_protocol


def get_config(arg: str = "1x16"):
    return aqlm_protocol("mistralai/Mistral-7B-v0.1", arg)
