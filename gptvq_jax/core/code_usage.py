"""How much of its codebooks a quantized weight uses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
