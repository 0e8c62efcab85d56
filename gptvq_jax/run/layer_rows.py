"""What is said of a quantized layer: its row in metrics.jsonl."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core import metrics
from gptvq_jax.core.code_usage import code_metrics
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.methods.layer import Objective, Problem, note, relative_error


def layer_row(
    problem: Problem,
    stored: QuantizedTensor | np.ndarray,
    kernel: jax.Array,
    judges: Sequence[Objective],
) -> dict[str, Any]:
    """Metrics of a layer.

    Args:
      problem: that was solved.
      stored: by this; the weight (R, C) itself where the layer stays dense.
      kernel: the same dequantized (R, C).
      judges: objectives of the windows that nothing was fitted to; none: there are no such windows.
    """
    return {
        **_stored_metrics(stored),
        **_errors(problem, kernel, problem.objectives, "relative_error", "sqnr_db"),
        **(
            _errors(problem, kernel, judges, "held_out_error", "held_out_sqnr_db") if judges else {}
        ),
        **({"note": text} if (text := note(problem, stored)) else {}),
        "num_values": problem.weight.size,
        "dead_inputs": int(jnp.sum(jnp.diagonal(problem.objectives[0].hessian) <= 0)),
        "damping": max(objective.factor.damping for objective in problem.objectives),
    }


def _stored_metrics(stored: QuantizedTensor | np.ndarray) -> dict[str, Any]:
    """Its codes and bytes; a dense weight has no codebook, and numbers of `index_bits` bits."""
    if isinstance(stored, QuantizedTensor):
        bits, size = stored.bits_per_value, stored.num_bytes
        return {**code_metrics(stored), "bits_per_value": bits, "num_bytes": size}
    bits = 8 * stored.dtype.itemsize
    dense = {"num_codebooks": 0, "dim": 1, "index_bits": bits}
    return {**dense, "bits_per_value": float(bits), "num_bytes": stored.nbytes}


def _errors(problem, kernel, objectives, error: str, sqnr_db: str) -> dict[str, float | None]:
    """Under these names; SQNR is None where the layer is exact."""
    found = relative_error(problem.weight, kernel, objectives)
    return {error: found, sqnr_db: float(metrics.sqnr_db(found)) if found > 0 else None}
