"""What helps on text that nothing was fitted to: damping, or rounds of polish, on six layers.

  python scripts/sweep.py --config=configs/sweeps/smollm2_held_out.py:damping
  python scripts/sweep.py --config=configs/sweeps/smollm2_held_out.py:polish

Layers of SmolLM2-135M at 2.12 true bits per value, fitted to 32 x 512 tokens, of which two draws
are made (calibration.seed; the codebooks are drawn anew too), and judged by 24 x 512 other tokens:
results.jsonl has that error, and as `fitted_error` of each layer the other. `damping` has 2D codes
and trellis codes (windows of 10 bits), `polish` 2D codes whose rounds no gain cuts off.
"""

from gptvq_jax.study.sweep.axes import axis, points, sweep


def get_config(arg: str = "damping"):
    draws = points("draw", {str(n): {"calibration.seed": n, "seed": n} for n in (0, 1)})
    methods = points("method", {"2d": {"vq.dim": 2}, "trellis": {"method": "trellis"}})
    axes = {
        "damping": [axis("damping", (0.001, 0.003, 0.01, 0.03, 0.1)), methods],
        "polish": [axis("vq.polish_rounds", (0, 1, 2, 4, 8), name="rounds")],
    }
    if arg not in axes:
        raise ValueError(f"{arg!r} is not one of {', '.join(axes)}")
    own = {"trellis.window_bits": 10, "trellis.bits": 2.118} if arg == "damping" else {}
    return sweep(
        f"smollm2_held_out_{arg}",
        base="smollm2_135m_2d:ablation",
        fields={
            "calibration.num_windows": 32,
            "calibration.held_out": 4,
            "evaluation.seqlen": 512,
            "evaluation.num_windows": 24,
            **own,
            **({"vq.polish_tolerance": 0.0} if arg == "polish" else {}),
        },
        axes=[*axes[arg], draws],
        kind="layers",
    )
