"""SmolLM2-135M-Instruct in 1, 2 and 4 dimensions, and in trellis codes, at 2, 3 and 4 bits.

  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py          # whole models
  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py:smoke    # two blocks
  python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py:layers   # six layers

All layers of a model have one format, and codebooks cost at most 0.125 bits per weight; tokens are
weighted by gradients. A code has 12 bits at most, so that vectors of 4 weights are there at 2 and
3 bits. Trellis codes (l8 has windows of 8 bits) get the true bits of the codebooks: a window of L
bits at K bits per weight spans L / K weights, and each weight is in as many windows; the whole
stream is one code. `layers` is the paper's first figure, SQNR against dimension at equal bits, with
AQLM and trellis codes beside it: six layers (study/sample_layers.py), each by itself, the error
measured on text that nothing was fitted to, every method with its defaults, and codebooks such that
in each row the true bits agree to 0.01 with those of AQLM; 4D at 3 bits is not there, for even one
codebook of 4096 centroids costs such small layers 0.2 bits more. `layers_long` has windows of 12
bits, the default, as well, which take four times as long as those of 10.
"""

from gptvq_jax.study.sweep.axes import axis, points, sweep

NAMES = ("2b", "3b", "4b")
# Of `layers`, (dimension, bits) -> weights that share a codebook, and the widest group.
GROUPS = {
    ("1d", "2b"): (286, 96),
    ("1d", "3b"): (764, 128),
    ("1d", "4b"): (400, 116),
    ("2d", "2b"): (1522, 576),
    ("2d", "3b"): (9174, 128),
    ("2d", "4b"): (12187, 576),
    ("4d", "2b"): (41233, 576),
}
# Bits -> M codebooks of B-bit codes for 8 weights, M * B / 8 of these bits.
AQLM = {"2b": (2, 8), "3b": (4, 6), "4b": (4, 8)}
# Trellis codes: L, by what is swept over, and true bits per value, as the codebooks have them.
WINDOWS = {"models": (8, 10, 12), "layers": (6, 8, 10), "layers_long": (6, 8, 10, 12)}
TRUE_BITS = {
    "models": {"2b": 2.117, "3b": 3.104, "4b": 4.111},
    "layers": {"2b": 2.168, "3b": 3.095, "4b": 4.315},
}


def get_config(arg: str = "models"):
    if arg in ("layers", "layers_long"):
        return _layers(arg)
    if arg not in ("models", "smoke"):
        raise ValueError(f"{arg!r} is not one of models, smoke, layers, layers_long")
    fields = {"calibration.gradient_groups": 1}
    if arg == "smoke":  # as configs/smollm2_135m_2d.py:smoke
        fields |= {"num_blocks": 2, "vq.polish_rounds": 0, "trellis.recode_passes": 0}
        for text, count in (("calibration", 8), ("evaluation", 2)):
            fields |= {f"{text}.num_windows": count, f"{text}.seqlen": 512, f"{text}.batch_size": 2}
    return sweep(
        f"smollm2_dimensionality{'_smoke' if arg == 'smoke' else ''}",
        base="smollm2_135m_2d:ablation",
        fields={"calibration.num_windows": 32, **fields},
        axes=[
            points("dimension", _dimensions() | _windows("models")),
            axis("vq.bits", (2.0, 3.0, 4.0), names=NAMES),
        ],
        cells=_trellis_bits("models", "models"),
    )


def _layers(arg: str):
    cells = {
        names: {"vq.group_size": size, "vq.max_group_cols": cols}
        for names, (size, cols) in GROUPS.items()
    }
    cells["4d", "3b"] = "a codebook of 4096 centroids costs these layers 0.2 bits more than its row"
    for bits, (books, width) in AQLM.items():
        cells["aqlm", bits] = {"aqlm.num_codebooks": books, "aqlm.code_bits": width}
    texts = {"calibration.num_windows": 8, "evaluation.num_windows": 4}
    texts |= {f"{text}.seqlen": 1024 for text in ("calibration", "evaluation")}
    aqlm = {"aqlm": {"method": "aqlm", "aqlm.dim": 8}}
    return sweep(
        f"smollm2_dimensionality_{arg}",
        base="smollm2_135m_2d:ablation",
        fields=texts,
        axes=[
            points("dimension", _dimensions() | aqlm | _windows(arg)),
            axis("vq.bits", (2.0, 3.0, 4.0), names=NAMES),
        ],
        kind="layers",
        cells=cells | _trellis_bits(arg, "layers"),
    )


def _dimensions():
    return {f"{dim}d": {"vq.dim": dim} for dim in (1, 2, 4)}


def _windows(arg: str):
    return {f"l{n}": {"method": "trellis", "trellis.window_bits": n} for n in WINDOWS[arg]}


def _trellis_bits(arg: str, of: str):
    return {
        (f"l{n}", name): {"trellis.bits": bits}
        for n in WINDOWS[arg]
        for name, bits in TRUE_BITS[of].items()
    }
