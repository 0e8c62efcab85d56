"""Decoding inside a Pallas-Triton kernel: a tile of codes becomes values, code by code.

A tile is rows of the weight x chunks of codes; one position of all its chunks is decoded at once.
All references are flat, all indices int32.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core.vq_tensor import BlockScales, block_scale_values
from gptvq_jax.ops.gpu.layout import Layout, PackedWeight


def decode_runs(
    weight: PackedWeight, layout: Layout, row: jax.Array, chunk: jax.Array
) -> Iterator[tuple[list, Iterator[tuple[int, list[jax.Array]]]]]:
    """Yields the runs of a tile: as many codes of a chunk as share their group and scale.

    A weight is a sum of terms: one for each codebook and each rank of factored codebooks.

    Args:
      weight: its arrays are references.
      row: (rows, 1) int32.
      chunk: (1, chunks) int32; chunks past the end of a row repeat the last one.

    Yields:
      the scale of every term, (rows, chunks) or None for 1; and an iterator over the columns of the
      run: (column within the chunk, value of every term before scaling (rows, chunks) float32).
    """
    grid, blocks = layout.grid, weight.block_scales
    chunk = jnp.minimum(chunk, layout.chunks - 1)
    words = [_load_words(weight.words, layout, m, row, chunk) for m in range(layout.num_codebooks)]
    length = math.gcd(layout.chunk_codes, grid.strip_vectors)
    if blocks is not None:
        length = math.gcd(length, blocks.block_size // grid.dim)
    for start in range(0, layout.chunk_codes, length):
        vector = chunk * layout.chunk_codes + start
        # The last chunk of a row may reach past the last strip.
        strip = jnp.minimum(lax.div(vector, jnp.int32(grid.strip_vectors)), grid.col_strips - 1)
        group = strip * grid.row_strips + lax.div(row, jnp.int32(grid.strip_rows))
        scales = _load_scales(weight, layout, group)
        if blocks is not None:
            factor = _load_block_scale(blocks, layout, row, strip, vector)
            scales = [scaled(factor, scale) for scale in scales]
        yield scales, _decode_run(weight, layout, words, group, range(start, start + length))


def scaled(value, scale):
    """value * scale, where None stands for 1."""
    return value if scale is None else value * scale


def int_range(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)


def _load_words(words, layout, book, row, chunk) -> list[jax.Array]:
    """The words of every chunk, each (rows, chunks) uint32."""
    first = (book * layout.grid.rows + row) * layout.row_words + chunk * layout.chunk_words
    return [words[first + i] for i in range(layout.chunk_words)]


def _load_scales(weight, layout, group) -> list:
    if weight.scale is None:
        return [None] * layout.num_codebooks
    grid, rank = layout.grid, max(1, layout.rank)
    groups = grid.col_strips * grid.row_strips
    return [
        weight.scale[(book * groups + group) * rank + term].astype(jnp.float32)
        for book in range(layout.num_codebooks)
        for term in range(rank)
    ]


def _load_block_scale(blocks: BlockScales, layout, row, strip, vector) -> jax.Array:
    grid = layout.grid
    vectors = blocks.block_size // grid.dim
    block = lax.div(vector - strip * grid.strip_vectors, jnp.int32(vectors))
    block = jnp.minimum(block, blocks.blocks - 1)  # a row's last chunk may reach past it
    row_bytes = -(-blocks.blocks // 2)
    byte = blocks.codes[(row * grid.col_strips + strip) * row_bytes + (block >> 1)]
    code = (byte.astype(jnp.int32) >> ((block & 1) * 4)) & 15
    return block_scale_values(code, blocks.offset[strip], blocks.step[strip])


def _decode_run(weight, layout, words, group, positions):
    grid = layout.grid
    groups = grid.col_strips * grid.row_strips
    for position in positions:
        codes = [_cut(chunk, position * layout.index_bits, layout.index_bits) for chunk in words]
        if layout.rank:
            index = [p * layout.table_size + code for code in codes for p in range(layout.rank)]
        else:
            # A sum, written as what one instruction computes together with the mask of the code.
            bases = [(book * groups + group) * layout.table_size for book in range(len(codes))]
            index = [base | code for base, code in zip(bases, codes, strict=True)]
        for word in range(layout.centroid_words):
            pairs = [weight.table[i * layout.centroid_words + word] for i in index]
            for half in range(min(2, grid.dim - 2 * word)):
                yield position * grid.dim + 2 * word + half, [_half(pair, half) for pair in pairs]


def _cut(words: list[jax.Array], start: int, bits: int) -> jax.Array:
    """The code at bit `start` of every chunk, int32."""
    word, shift = divmod(start, 32)
    value = words[word] >> shift
    if shift + bits > 32:
        value |= words[word + 1] << (32 - shift)
    return (value & (2**bits - 1)).astype(jnp.int32)


def _half(pair: jax.Array, half: int) -> jax.Array:
    """One of two float16 of a uint32, or what is one value already; float32."""
    if pair.dtype == jnp.uint32:
        bits = (pair >> (16 * half)).astype(jnp.uint16)
        pair = lax.bitcast_convert_type(bits, jnp.float16)
    return pair.astype(jnp.float32)
