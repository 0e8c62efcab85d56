"""SmolLM2-135M-Instruct, quantized and then tuned as a whole, on a laptop.

  python scripts/quantize.py --config=configs/smollm2_135m_tune.py        # trellis, 2.125 bits
  python scripts/quantize.py --config=configs/smollm2_135m_tune.py:2d     # GPTVQ 2D, 2.125 bits
  python scripts/quantize.py --config=configs/smollm2_135m_tune.py:smoke  # two blocks, quick
  python scripts/finetune.py --checkpoint=DIR --workdir=OUT --config=configs/smollm2_135m_tune.py

The first two quantize, tune every block, and then the whole model. The last tunes a checkpoint that
is there already: of this config it reads how. 160 steps of 8 windows, 4.3 TFLOP each. On 2 cores of
an AMD EPYC (virtual machine, AVX-512) a step took 16 s. Half, --config.finetune.epochs=2, took
the divergence on windows held out from 0.451 to 0.374 (trellis, 2.124 bits, blocks not tuned).
"""

from gptvq_jax.console.config_file import load_config

QUANTIZED = {
    "trellis": "smollm2_135m_trellis:2b",
    "2d": "smollm2_135m_2d:2b",
    "smoke": "smollm2_135m_trellis:smoke",
}


def get_config(arg: str = "trellis"):
    if arg not in QUANTIZED:
        raise ValueError(f"{arg!r} is not one of {', '.join(QUANTIZED)}")
    config = load_config(QUANTIZED[arg])
    config.tune.model = True
    config.tune.block = arg != "smoke"
    config.finetune.num_windows, config.finetune.held_out = 320, 16
    config.finetune.epochs = 4
    config.finetune.learning_rate = config.finetune.scale_learning_rate = 4e-3
    config.finetune.norm_learning_rate = 2e-3
    if arg == "smoke":
        config.finetune.num_windows, config.finetune.held_out, config.finetune.epochs = 8, 2, 1
        config.finetune.batch_size, config.finetune.evaluate_every = 4, 1
    return config
