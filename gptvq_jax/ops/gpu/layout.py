"""The layout that `pallas_gpu` reads: the stored codes in 32-bit words, centroids in float16."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.core import packing
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.vq_tensor import BlockScales, DenseCodebook, FactoredCodebook, VQTensor

_static = partial(dataclasses.field, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything but arrays. A chunk of codes is the fewest that fill whole words."""

    grid: GroupGrid
    index_bits: int
    codebook_size: int
    num_codebooks: int  # M
    rank: int  # p of factored codebooks, 0: dense

    @property
    def chunk_words(self) -> int:
        return self.index_bits // math.gcd(self.index_bits, 32)

    @property
    def chunk_codes(self) -> int:
        return 32 // math.gcd(self.index_bits, 32)

    @property
    def chunks(self) -> int:
        """In a row."""
        return -(-self.grid.num_vectors // self.chunk_codes)

    @property
    def chunk_cols(self) -> int:
        """Columns that the codes of a chunk stand for."""
        return self.chunk_codes * self.grid.dim

    @property
    def row_words(self) -> int:
        return self.chunks * self.chunk_words

    @property
    def table_size(self) -> int:
        """Centroids of a table: as many as there are codes, used or not."""
        return 2**self.index_bits

    @property
    def centroid_words(self) -> int:
        """Elements of a table that make one centroid."""
        return -(-self.grid.dim // 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A VQTensor as the kernel reads it.

    The table of a factored codebook is shared by all groups, whose left factor is their `scale`.
    """

    words: jax.Array  # (M, R, chunks * chunk_words) uint32: the stored bytes, rows padded
    # Dense: (M, S, G, 2^bits, ceil(D / 2)) uint32 of two float16, or float16 where D = 1.
    # Factored: (p, 2^bits) float32.
    table: jax.Array
    scale: jax.Array | None  # (M, S, G); (M, S, G, p) of a factored codebook; None: 1
    block_scales: BlockScales | None
    layout: Layout = _static()


def pack(tensor: VQTensor) -> PackedWeight:
    """Exact: float16 holds every int8, and the scales stay apart."""
    assert tensor.row_scales is None, "row scales are VQKernel's to apply"
    book = tensor.codebook
    if isinstance(book, FactoredCodebook):
        size, rank, scale, table = book.right.shape[1], book.right.shape[0], book.left, _right(book)
    else:
        size, rank, scale, table = book.codebook_size, 0, book.scale, _centroids(book)
    layout = Layout(tensor.grid, tensor.index_bits, size, tensor.codes.shape[0], rank)
    # Filled up to 2^bits centroids: no spare bits of a row lead outside.
    axis = 1 if rank else 3
    pad = [(0, 0)] * table.ndim
    pad[axis] = (0, layout.table_size - size)
    table = jnp.pad(table, pad)
    return PackedWeight(_words(tensor.codes, layout), table, scale, tensor.block_scales, layout)


def unpack(packed: PackedWeight) -> VQTensor:
    """The same weight as a VQTensor, int8 and int4 centroids as float16."""
    layout = packed.layout
    grid, size = layout.grid, layout.codebook_size
    codes = lax.bitcast_convert_type(packed.words, jnp.uint8)
    codes = codes.reshape(*codes.shape[:2], -1)
    codes = codes[..., : packing.packed_length(grid.num_vectors, layout.index_bits)]
    if layout.rank:
        codebook = FactoredCodebook(packed.scale, None, packed.table[:, :size])
    else:
        table = packed.table
        table = lax.bitcast_convert_type(table, jnp.float16).reshape(*table.shape[:4], -1)
        table = table[..., :size, : grid.dim]
        codebook = DenseCodebook(table, packed.scale, 16, size, grid.dim)
    return VQTensor(codes, codebook, packed.block_scales, layout.index_bits, grid)


def _words(codes: jax.Array, layout: Layout) -> jax.Array:
    pad = 4 * layout.row_words - codes.shape[-1]
    codes = jnp.pad(codes, ((0, 0), (0, 0), (0, pad)))
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:2], -1, 4), jnp.uint32)


def _right(codebook: FactoredCodebook) -> jax.Array:
    """The right factor with the scale of the left one (p, K), float32."""
    right = codebook.right.astype(jnp.float32)
    if codebook.left_scale is None:
        return right
    return right * codebook.left_scale.astype(jnp.float32)[:, None]


def _centroids(codebook: DenseCodebook) -> jax.Array:
    """Centroids before scaling, float16: (M, S, G, K, 1), or pairs in uint32."""
    if codebook.scale is not None:
        codebook = dataclasses.replace(codebook, scale=jnp.ones_like(codebook.scale))
    centroids = codebook.values().astype(jnp.float16)
    if codebook.dim == 1:
        return centroids
    centroids = jnp.pad(centroids, [(0, 0)] * 4 + [(0, codebook.dim % 2)])
    pairs = centroids.reshape(*centroids.shape[:4], -1, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint32)
