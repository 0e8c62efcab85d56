"""The rows of the ablations (ablations.py): what each changes."""

from typing import Any

PAPER = {
    "seed": "mahalanobis",
    "em_iterations": 100,
    "exact_metric": False,
    "codebook_update": "adam",
    "update_iterations": 25,
    "polish_rounds": 0,
}

# {method: {row: what differs}}: fields of the method's settings, and ROTATION.
_VQ_LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper's choices": PAPER,
    "diagonal metric": {"exact_metric": False},
    "diagonal metric + no polish": {"exact_metric": False, "polish_rounds": 0},
    "seed mahalanobis": {"seed": "mahalanobis"},
    "seed mahalanobis + no polish": {"seed": "mahalanobis", "polish_rounds": 0},
    "0 EM steps": {"em_iterations": 0},
    "5 EM steps": {"em_iterations": 5},
    "10 EM steps": {"em_iterations": 10},
    "50 EM steps": {"em_iterations": 50},
    "100 EM steps": {"em_iterations": 100},
    "no polish": {"polish_rounds": 0},
    "no polish + no codebook update": {"codebook_update": "none", "polish_rounds": 0},
    "no polish + 25 steps of Adam": {
        "codebook_update": "adam",
        "update_iterations": 25,
        "polish_rounds": 0,
    },
    "recode without refit": {"codebook_update": "none"},
    "1 polish round": {"polish_rounds": 1},
    "2 polish rounds": {"polish_rounds": 2},
    "3 polish rounds": {"polish_rounds": 3},
    "2 polish rounds of 2 refit steps": {"polish_rounds": 2, "update_iterations": 2},
    "20 polish rounds to 0.001": {"polish_rounds": 20, "polish_tolerance": 0.001},
    "2 refit steps": {"update_iterations": 2},
    "20 refit steps": {"update_iterations": 20},
    "scale blocks of 32": {"scale_block_size": 32},
    "scale blocks of 64": {"scale_block_size": 64},
    "float16 codebooks": {"codebook_bits": 16},
    "int4 codebooks": {"codebook_bits": 4},
}

ROTATION = "rotation"  # no field: the layer is rotated before, and back after (rotation.py)
_NO_OUTLIERS, _ONE_RATE = {"outlier_limit": "0"}, {"column_rates": False}
_TRELLIS_LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "L = 6": {"window_bits": 6},
    "L = 8": {"window_bits": 8},
    "L = 10": {"window_bits": 10},
    "L = 12": {"window_bits": 12},
    "L = 14": {"window_bits": 14},
    "one rate for all columns": _ONE_RATE,
    "no outliers": _NO_OUTLIERS,
    "one rate + no outliers": {**_ONE_RATE, **_NO_OUTLIERS},
    "rotation": {ROTATION: True},
    "rotation + one rate": {ROTATION: True, **_ONE_RATE},
    "rotation + no outliers": {ROTATION: True, **_NO_OUTLIERS},
    "rotation + one rate + no outliers": {ROTATION: True, **_ONE_RATE, **_NO_OUTLIERS},
    "outliers beyond 3.5": {"outlier_limit": "3.5"},
    "outliers beyond 4.5": {"outlier_limit": "4.5"},
    "outliers beyond 6": {"outlier_limit": "6"},
    "tails bitten every 32 rows": {"stream_rows": 32},
    "tails bitten every 64 rows": {"stream_rows": 64},
    "tails bitten every 128 rows": {"stream_rows": 128},
    "tails bitten every 512 rows": {"stream_rows": 512},
    "streams are whole columns": {"stream_rows": 1 << 20},
    "no recode pass": {"recode_passes": 0},
    "1 recode pass": {"recode_passes": 1},
    "4 recode passes": {"recode_passes": 4},
    "8 recode passes": {"recode_passes": 8},
}
LAYER_ROWS = {"gptvq": _VQ_LAYERS, "trellis": _TRELLIS_LAYERS}

# {method of the base config: {row: fields that differ from those of the base}}.
_TEXT: dict[str, dict[str, Any]] = {
    "half the calibration windows": {"calibration.num_windows": 0.5},
    "twice the calibration windows": {"calibration.num_windows": 2},
    "four times the calibration windows": {"calibration.num_windows": 4},
}
_DAMPING: dict[str, dict[str, Any]] = {
    "damping 0.001": {"damping": 0.001},
    "damping 0.003": {"damping": 0.003},
    "damping 0.03": {"damping": 0.03},
    "damping 0.1": {"damping": 0.1},
}
_VQ_MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "default (seed 1)": {"seed": 1},
    "default (seed 2)": {"seed": 2},
    "paper's choices": {
        "calibration.asymmetry": 0.0,
        **{f"vq.{field}": value for field, value in PAPER.items()},
    },
    "no polish": {"vq.polish_rounds": 0},
    "polish judged by held-out windows": {"vq.polish_judge": "held_out"},
    "symmetric target": {"calibration.asymmetry": 0.0},
    "asymmetric target 0.5": {"calibration.asymmetry": 0.5},
    "gradient weights": {"calibration.gradient_groups": 1},
    "gradient weights to power 1": {
        "calibration.gradient_groups": 1,
        "calibration.gradient_power": 1.0,
    },
    "gradient weights in 2 row groups": {"calibration.gradient_groups": 2},
    "allocation of bits": {"allocation.bits_per_value": 2.125},
    "allocation of bits + gradient weights": {
        "allocation.bits_per_value": 2.125,
        "calibration.gradient_groups": 1,
    },
    "allocation of bits in 2D and 4D + gradient weights": {
        "allocation.bits_per_value": 2.125,
        "allocation.dims": (2, 4),
        "calibration.gradient_groups": 1,
    },
    "one pass over a block": {"true_sequential": False},
    "float inputs": {"calibration.inputs": "float", "calibration.asymmetry": 0.0},
    **_DAMPING,
    **_TEXT,
    "int8 embedding": {"embeddings": "int8"},
}
_SAME_BITS = {"allocation.bits_per_value": 0.0}
_TRELLIS_MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "L = 8": {"trellis.window_bits": 8},
    "L = 10": {"trellis.window_bits": 10},
    "the same bits for every layer": _SAME_BITS,
    "the same bits for every column": {**_SAME_BITS, "trellis.column_rates": False},
    "no outliers": {"trellis.outlier_limit": "0"},
    "outliers beyond 4.5": {"trellis.outlier_limit": "4.5"},
    "nothing held out": {"calibration.held_out": 0},
    "tails bitten every 64 rows": {"trellis.stream_rows": 64},
    "no recode pass": {"trellis.recode_passes": 0},
    "1 recode pass": {"trellis.recode_passes": 1},
    "4 recode passes": {"trellis.recode_passes": 4},
    "symmetric target": {"calibration.asymmetry": 0.0},
    "asymmetric target 0.5": {"calibration.asymmetry": 0.5},
    "no gradient weights": {"calibration.gradient_groups": 0},
    "gradient weights to power 0.25": {"calibration.gradient_power": 0.25},
    "gradient weights to power 1": {"calibration.gradient_power": 1.0},
    **_DAMPING,
    **_TEXT,
}
MODEL_ROWS = {"gptvq": _VQ_MODELS, "trellis": _TRELLIS_MODELS}
