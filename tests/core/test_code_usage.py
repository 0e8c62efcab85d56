"""Which codes a tensor uses, and how evenly, against counts in a loop."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.code_usage import code_usage
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.vq_tensor import DenseCodebook, VQTensor, pack_codes
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor


@pytest.mark.parametrize(
    "fmt, grid",
    [
        (TensorFormat(dim=2, index_bits=3), GroupGrid(5, 11, 2, strip_rows=2, strip_cols=4)),
        (
            TensorFormat(dim=4, index_bits=5, codebook_bits=16, num_codebooks=2, row_scales=True),
            GroupGrid(5, 22, 4, strip_rows=5, strip_cols=24),
        ),
        (
            TensorFormat(dim=2, index_bits=4, codebook_bits=16, num_codebooks=2),
            GroupGrid(7, 12, 2, strip_rows=4, strip_cols=8),
        ),
    ],
    ids=["groups of strips", "aqlm", "both"],
)
def test_codes_are_counted_by_table(fmt, grid):
    tensor = random_tensor(fmt, grid)
    codes = np.asarray(tensor.unpack_codes())
    books, rows, vectors = codes.shape
    tables = {}
    for m in range(books):
        for r in range(rows):
            for j in range(vectors):
                table = (m, r // grid.strip_rows, j // grid.strip_vectors)
                tables.setdefault(table, Counter())[codes[m, r, j]] += 1
    usage = code_usage(tensor)
    centroids = len(tables) * 2**fmt.index_bits
    assert usage.unused_centroids == centroids - sum(map(len, tables.values()))
    assert 0 < usage.unused_centroids < centroids
    entropy = 0.0
    for counts in tables.values():
        share = np.array(list(counts.values())) / counts.total()
        entropy -= counts.total() / codes.size * np.sum(share * np.log2(share))
    assert float(usage.code_entropy) == pytest.approx(entropy, rel=1e-5)
    assert 0 < entropy < fmt.index_bits


@pytest.mark.parametrize(
    "codes, unused, entropy",
    [
        (np.arange(16) % 4, 0, 2.0),  # every code of 2 bits, as often as the others
        (np.arange(16) % 4 // 2 * 2, 4, 1.0),
        (np.zeros(16, int), 6, 0.0),
    ],
)
def test_even_codes_and_one_code(codes, unused, entropy):
    grid = GroupGrid(2, 8, 2, strip_rows=2, strip_cols=8)
    book = DenseCodebook(jnp.zeros((2, 1, 1, 4, 2), jnp.float16), None, 16, 4, 2)
    packed = pack_codes(jnp.asarray(codes).reshape(2, 4, 2), 2, grid)
    usage = code_usage(VQTensor(packed, book, None, 2, grid))
    assert (usage.unused_centroids, usage.code_entropy) == (unused, entropy)
