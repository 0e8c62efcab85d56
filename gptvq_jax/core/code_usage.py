"""How much of its codebooks, or of its table, a quantized weight uses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import MAX_RATE, TrellisTensor
from gptvq_jax.core.vq_tensor import VQTensor, flat_index


class CodeUsage(NamedTuple):
    """Of all codebooks and groups of a tensor."""

    unused_centroids: jax.Array  # (), int32: those that no vector uses
    code_entropy: jax.Array  # (), float32, bits per code; index_bits where all are used alike


@jax.jit
def code_usage(tensor: VQTensor) -> CodeUsage:
    """Counts the codes of every table of centroids.

    The entropy is that of the frequencies of a table's codes, of each table by itself, and the mean
    over tables goes by their number of codes: what an ideal entropy coder with a model for each
    table would spend on a code. Frequencies of few codes vary more than their probabilities: a
    table of K centroids with not many times K codes looks less uniform than it is.
    """
    tables = tensor.codes.shape[0] * tensor.grid.col_strips * tensor.grid.row_strips
    counts = jnp.zeros(tables * 2**tensor.index_bits, jnp.int32).at[flat_index(tensor)].add(1)
    unused = counts.size - jnp.count_nonzero(counts)
    counts = counts.reshape(tables, -1).astype(jnp.float32)
    of_table = jnp.sum(counts, axis=1, keepdims=True)  # at least one code each
    share = counts / of_table
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=1) / jnp.log(2.0)
    mean = jnp.sum(entropy * of_table[:, 0] / jnp.sum(of_table))
    return CodeUsage(unused, jnp.maximum(mean, 0.0))


@jax.jit
def window_entropy(tensor: TrellisTensor) -> jax.Array:
    """Bits per window, (): the entropy of the windows in all columns that have codes, at most L."""
    counted = jnp.broadcast_to(tensor.column_rates() > 0, tensor.shape).astype(jnp.int32)
    counts = jnp.zeros(2**tensor.window_bits, jnp.int32).at[tensor.windows()].add(counted)
    share = counts / jnp.maximum(jnp.sum(counts), 1)
    return jnp.maximum(-jnp.sum(jax.scipy.special.xlogy(share, share)) / jnp.log(2.0), 0.0)


def code_metrics(tensor: QuantizedTensor) -> dict[str, Any]:
    """What the metrics of a layer say of its codes; a window of a trellis is a code of L bits."""
    if isinstance(tensor, TrellisTensor):
        rates = tensor.column_rates()
        return {
            "num_codebooks": 1,
            "dim": 1,
            "index_bits": tensor.window_bits,
            "code_entropy": float(window_entropy(tensor.for_compilation())),
            "stream_rows": tensor.stream_rows,
            "columns_by_rate": jnp.bincount(rates, length=MAX_RATE + 1).tolist(),
            "outliers": 0 if tensor.outlier_gaps is None else len(tensor.outlier_gaps),
        }
    usage = code_usage(tensor)
    return {
        "num_codebooks": len(tensor.codes),
        "dim": tensor.grid.dim,
        "index_bits": tensor.index_bits,
        "code_entropy": float(usage.code_entropy),
        "unused_centroids": int(usage.unused_centroids),
    }
