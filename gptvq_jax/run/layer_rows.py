"""What is said of a quantized layer: its row in metrics.jsonl."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gptvq_jax.core import metrics
from gptvq_jax.core.code_usage import code_metrics
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.methods.layer import Objective, Problem, note, relative_error


def layer_row(
    problem: Problem, tensor: QuantizedTensor, kernel: jax.Array, judges: Sequence[Objective]
) -> dict[str, Any]:
    """Metrics of a layer.

    Args:
      problem: that was solved.
      tensor: by this.
      kernel: the tensor dequantized (R, C).
      judges: objectives of the windows that nothing was fitted to; none: there are no such windows.
    """
    return {
        **code_metrics(tensor),
        **_errors(problem, kernel, problem.objectives, "relative_error", "sqnr_db"),
        **(
            _errors(problem, kernel, judges, "held_out_error", "held_out_sqnr_db") if judges else {}
        ),
        **({"note": text} if (text := note(problem, tensor)) else {}),
        "bits_per_value": tensor.bits_per_value,
        "num_bytes": tensor.num_bytes,
        "num_values": problem.weight.size,
        "dead_inputs": int(jnp.sum(jnp.diagonal(problem.objectives[0].hessian) <= 0)),
        "damping": max(objective.factor.damping for objective in problem.objectives),
    }


def _errors(problem, kernel, objectives, error: str, sqnr_db: str) -> dict[str, float | None]:
    """Under these names; SQNR is None where the layer is exact."""
    found = relative_error(problem.weight, kernel, objectives)
    return {error: found, sqnr_db: float(metrics.sqnr_db(found)) if found > 0 else None}
