"""How much text a layer needs: six layers of SmolLM2-135M, calibrated on 4 to 32 x 1024 tokens.

  python scripts/sweep.py --config=configs/sweeps/smollm2_tokens.py

2D codes and trellis codes (windows of 10 bits) at 2.12 true bits per value, each layer by itself.
results.jsonl has the error on text that nothing was fitted to, 8 x 1024 other tokens, and as
`fitted_error` of each layer that on the text itself: they meet where there is text enough.
"""

from gptvq_jax.study.sweep.axes import axis, points, sweep


def get_config():
    return sweep(
        "smollm2_tokens",
        base="smollm2_135m_2d:ablation",
        fields={
            "calibration.seqlen": 1024,
            "evaluation.seqlen": 1024,
            "evaluation.num_windows": 8,
            "trellis.window_bits": 10,
            "trellis.bits": 2.118,
        },
        axes=[
            axis("calibration.num_windows", (4, 8, 16, 32), name="windows"),
            points("method", {"2d": {"vq.dim": 2}, "trellis": {"method": "trellis"}}),
        ],
        kind="layers",
    )
