"""SmolLM2-135M-Instruct in 1, 2 and 4 dimensions at 2, 3 and 4 index bits per weight.

  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py          # whole models
  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py:smoke    # two blocks
  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py:layers   # six layers

All layers of a model have one format, and codebooks cost at most 0.125 bits per weight; tokens are
weighted by gradients. A code has 8 bits at most, so that vectors of 4 weights are there at 2 bits
only. `layers` is the paper's first figure, SQNR against dimension at equal bits, with AQLM beside
it: six layers (study/sample_layers.py), each by itself, the error measured on text that nothing was
fitted to, and codebooks such that in each row the true bits agree to 0.01 with those of AQLM.
"""

from gptvq_jax.study.sweep.axes import axis, sweep

BITS = (2.0, 3.0, 4.0)
# (dim, index bits) -> weights that share a codebook.
GROUPS = {
    (1, 2): 500,
    (1, 3): 600,
    (1, 4): 847,
    (2, 2): 2830,
    (2, 3): 7820,
    (2, 4): 24190,
    (4, 2): 85000,
}
# Index bits -> M codebooks of B-bit codes for D weights, M * B / D = bits.
AQLM = {2: (2, 8, 8), 3: (4, 6, 8), 4: (4, 8, 8)}


def get_config(arg: str = "models"):
    if arg == "layers":
        return _layers()
    if arg not in ("models", "smoke"):
        raise ValueError(f"{arg!r} is not one of models, smoke, layers")
    fields = {"calibration.gradient_groups": 1}
    if arg == "smoke":  # as configs/smollm2_135m_2d.py:smoke
        fields |= {"num_blocks": 2, "vq.polish_rounds": 0}
        for text, count in (("calibration", 8), ("evaluation", 2)):
            fields |= {f"{text}.num_windows": count, f"{text}.seqlen": 512, f"{text}.batch_size": 2}
    return sweep(
        f"smollm2_dimensionality{'_smoke' if arg == 'smoke' else ''}",
        base="smollm2_135m_2d:ablation",
        fields={"calibration.num_windows": 32, **fields},
        axes=[
            axis("vq.dim", (1, 2, 4), names=("1d", "2d", "4d")),
            axis("vq.bits", BITS, names=("2b", "3b", "4b")),
        ],
    )


def _layers():
    raise NotImplementedError
