"""Llama-2-7B, AQLM with block tuning.

  python scripts/quantize.py --config=configs/llama2_7b_aqlm.py:1x16 --config.model=DIR_OR_HUB_NAME

A code is MxBgD: M codebooks of B-bit codes for D weights (8 if not said). 1x16 and 2x8 take 2 bits
per weight for the codes, 2x12 takes 3.
The paper's WikiText-2 perplexity: 6.59 at about 2 bits and 5.46 at about 3 (float 5.12)
(arXiv 2401.06118, context 4096; 18 h, 35 h with block tuning).
This code has not run it yet.
"""

from gptvq_jax.paper import aqlm_protocol


def get_config(arg: str = "1x16"):
    return aqlm_protocol("meta-llama/Llama-2-7b-hf", arg)
