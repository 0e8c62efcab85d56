"""x W^T from packed codes on NVIDIA GPUs: a Pallas kernel for few rows of x.

This is the one for codes that stand for centroids; that for trellis codes is gpu/trellis.py.

Codes are cut out of 32-bit words and looked up by loads through index arrays; no decoded weight
reaches memory. The form depends on N, the rows of x:

  N <= 2, or float32   decoded values are multiplied and added in float32, once per row of x
  N <= 64              decoded tiles in the dtype of x go through tensor cores
  above                `xla.matmul` decodes the weight once and stores it

Why Triton and not Mosaic GPU: of the ways to look up a table in Mosaic GPU, those that its
interpreter runs (jnp.take) do not lower, and the one that lowers (inline MLIR) is refused by the
interpreter; so it was in JAX 0.10.2 and 0.12.0. A kernel of it could not be tested without a GPU.
What is left, a chain of K selects or a load per warpgroup, costs more than to decode by XLA. In
Triton a lookup is a load: one source runs on a CPU and compiles for the GPU. From JAX 0.11 on,
compiling it says that Pallas-Triton is deprecated.

What batch 1 must cost on an H100 (3.35 TB/s; 132 SMs, 128 lanes a clock, 1.7 GHz) for 8192 x 28672
weights at 2.125 bits (D = 2, 4-bit codes, groups of 2048):

  bytes         62 MB stored, 66 MB as read (float16 centroids): 20 us. In bfloat16 470 MB: 140 us.
  instructions  117 M vectors, each: code 3, address 1, load 1, two halves to float32 2, products 2,
                sums 2, and a share of what a step does once: 12.5 as compiled, 51 us.

So instructions bound it, at 2.7 times the speed of bfloat16; 4 times would allow 8.6 of them. (The
compiler does not fuse products with sums: 2 of them.) The program of `xla` has 27 and writes sums
and centroids in float32, 19 MB. These are counts of compiled programs, nothing was measured. What
keeps them down:

  * A thread reads codes by words, not one by one, and lanes lie along columns.
  * The D values of a centroid are D / 2 words. int8 is held as float16, whose halves convert in one
    instruction each. A table of 16 centroids of D = 2 is half a cache line.
  * A program owns 64 rows, so one program reads the tables of strips that are not taller, and loads
    x once for eight rows of a thread. Where rows are few, programs share the columns and their sums
    are added afterwards.
  * A scale multiplies sums of products, not centroids.

Lanes that ask for many lines, or many words of a memory bank, wait in turn: a table of 64 centroids
costs more than this count.
"""

import dataclasses
import functools
import operator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.ops import xla
from gptvq_jax.ops.gpu import trellis
from gptvq_jax.ops.gpu.decode import decode_runs, int_range, scaled
from gptvq_jax.ops.gpu.layout import Layout, PackedWeight, unpack
from gptvq_jax.ops.gpu.layout import pack as pack_codebooks

KINDS = (VQTensor, TrellisTensor)
_MAX_BATCH = 64  # rows of x that the kernel takes
_PRODUCTS_BATCH = 2  # rows of x that a program multiplies without tensor cores
_WARPS = 4


def check(tensor: QuantizedTensor) -> None:
    """Supports every tensor whose arrays 32-bit indices reach."""
    if isinstance(tensor, TrellisTensor):
        trellis.check(tensor)
        return
    packed = jax.eval_shape(pack, tensor)
    largest = max(packed.words.size, packed.table.size)
    if largest >= 2**31:
        raise NotImplementedError(f"an array of {largest} elements needs 64-bit indices")


def pack(tensor: QuantizedTensor) -> PackedWeight | trellis.PackedTrellis:
    """Words of codes and tables, made once; exact."""
    return trellis.pack(tensor) if isinstance(tensor, TrellisTensor) else pack_codebooks(tensor)


def matmul(
    x: jax.Array, packed: PackedWeight | trellis.PackedTrellis, *, interpret: bool = False
) -> jax.Array:
    """x (N, C), packed weight of shape (R, C) -> (N, R) float32.

    Args:
      x: floating point; float32 is multiplied as float32, not in fewer bits.
      packed: from `pack`.
      interpret: runs the kernel as jnp operations, on any platform.
    """
    if isinstance(packed, trellis.PackedTrellis):
        return trellis.matmul(x, packed, interpret=interpret)
    batch = x.shape[0]
    if not 1 <= batch <= _MAX_BATCH:
        return xla.matmul(x, unpack(packed))
    return run_kernel(x, packed, choose_tile(packed.layout, batch, x.dtype), interpret)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes."""

    rows: int  # of the weight, a power of two
    chunks: int  # of codes in one step along columns, a power of two
    steps: int  # along columns
    splits: int  # programs that share the columns
    batch: int  # rows of x
    tensor_cores: bool


def choose_tile(layout: Layout, batch: int, dtype: jnp.dtype) -> Tile:
    """From counts of registers and programs; not tuned on hardware."""
    rows = min(64, max(16, _power_of_two(layout.grid.rows)))  # 64: a warpgroup's matrix product
    chunks = 16  # 256 columns of 2-bit values, the usual width of a group
    if batch > _PRODUCTS_BATCH and jnp.dtype(dtype).itemsize == 2:
        block, tensor_cores, wanted = max(16, _power_of_two(batch)), True, 512
    else:
        block, tensor_cores, wanted = min(batch, _PRODUCTS_BATCH), False, 1024  # 8 for each SM
    all_steps = -(-layout.chunks // chunks)
    programs = -(-layout.grid.rows // rows) * -(-batch // block)
    steps = -(-all_steps // max(1, wanted // programs))
    return Tile(rows, chunks, steps, -(-all_steps // steps), block, tensor_cores)


def run_kernel(x: jax.Array, packed: PackedWeight, tile: Tile, interpret: bool) -> jax.Array:
    """`matmul` with a given tile."""
    rows, batch = packed.layout.grid.rows, x.shape[0]
    row_tiles, blocks = -(-rows // tile.rows), -(-batch // tile.batch)
    # Whole tiles: what a program writes past the last row is cut off here.
    shape = tile.splits, blocks * tile.batch, row_tiles * tile.rows
    sums = pl.pallas_call(
        partial(_kernel, layout=packed.layout, tile=tile),
        grid=(row_tiles, tile.splits, blocks),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="vq_matmul",
    )(jax.tree.map(jnp.ravel, packed), _arrange(x, packed.layout, tile))
    return jnp.sum(sums, axis=0)[:batch, :rows]


def _arrange(x: jax.Array, layout: Layout, tile: Tile) -> jax.Array:
    """x with the columns of a chunk apart and chunks side by side, as lanes read them.

    Returns:
      (N, chunk columns, chunks) float32, or (chunk columns, chunks, N) for tensor cores; zeros in
      the padding, which make its codes harmless.
    """
    chunks = tile.splits * tile.steps * tile.chunks
    pad = chunks * layout.chunk_cols - x.shape[1]
    x = jnp.pad(x, ((0, -x.shape[0] % tile.batch), (0, pad)))
    x = x.reshape(-1, chunks, layout.chunk_cols)
    if tile.tensor_cores:
        return x.transpose(2, 1, 0)
    return x.transpose(0, 2, 1).astype(jnp.float32)


def _kernel(weight: PackedWeight, x_ref, out_ref, *, layout: Layout, tile: Tile):
    """One program. Arrays of `weight`, all flat, x of `_arrange` and the output are references.

    out_ref: (splits, N, R), padded.
    """
    first_row = pl.program_id(0) * tile.rows
    split = pl.program_id(1)
    batch = pl.program_id(2) * tile.batch
    row = jnp.minimum(first_row + int_range(tile.rows), layout.grid.rows - 1)[:, None]
    add = _add_dots if tile.tensor_cores else _add_products

    def step(i, sums):
        first = (split * tile.steps + i) * tile.chunks
        runs = decode_runs(weight, layout, row, first + int_range(tile.chunks)[None, :])
        return add(sums, runs, x_ref, batch, pl.ds(first, tile.chunks))

    rows = pl.ds(first_row, tile.rows)
    if tile.tensor_cores:
        sums = jnp.zeros((tile.rows, tile.batch), jnp.float32)
        sums = lax.fori_loop(0, tile.steps, step, sums)
        out_ref[split, pl.ds(batch, tile.batch), rows] = sums.T
        return
    sums = (jnp.zeros((tile.rows, tile.chunks), jnp.float32),) * tile.batch
    for n, tile_sums in enumerate(lax.fori_loop(0, tile.steps, step, sums)):
        out_ref[split, batch + n, rows] = jnp.sum(tile_sums, axis=1)


def _add_products(sums, runs, x_ref, batch, chunks):
    """Multiplies and adds in float32; the scale of a run multiplies its sum.

    Args:
      sums: one per row of x, (rows, chunks).
    """
    for scales, columns in runs:
        parts = [[None] * len(sums) for _ in scales]
        for column, values in columns:
            for n in range(len(sums)):
                factor = x_ref[batch + n, column, chunks]
                for part, value in zip(parts, values, strict=True):
                    product = value * factor
                    part[n] = product if part[n] is None else part[n] + product
        for part, scale in zip(parts, scales, strict=True):
            sums = tuple(a + scaled(b, scale) for a, b in zip(sums, part, strict=True))
    return sums


def _add_dots(sums, runs, x_ref, batch, chunks):
    """Multiplies decoded weights, rounded to the dtype of x, on tensor cores.

    Args:
      sums: (rows, N).
    """
    for scales, columns in runs:
        for column, values in columns:
            weight = functools.reduce(operator.add, map(scaled, values, scales)).astype(x_ref.dtype)
            factor = x_ref[column, chunks, pl.ds(batch, sums.shape[1])]
            sums += jnp.dot(weight, factor, preferred_element_type=jnp.float32)
    return sums


def _power_of_two(value: int) -> int:
    """The least power of two that is not less."""
    return 1 << (value - 1).bit_length()
