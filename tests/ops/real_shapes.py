"""Weights of the size of Llama's as shapes alone, to count bytes and to compile for."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor, random_trellis

SHAPES = (4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672)
FORMATS = {
    "1d 3 bit": TensorFormat(1, 3, 512),
    "2d 2 bit": TensorFormat(2, 4, 1024),
    "2d 3 bit": TensorFormat(2, 6, 2048),
    "2d 4 bit": TensorFormat(2, 8, 8192),
    "4d 2 bit": TensorFormat(4, 8, 65536),
    "2d 2 bit, int4 centroids": TensorFormat(2, 4, 512, codebook_bits=4),
    "uniform 4 bit": TensorFormat(1, 4, 128, 128, codebook_bits=16, rank=2),
    "aqlm 2x8": TensorFormat(8, 8, codebook_bits=16, num_codebooks=2),
}


def abstract_tensor(fmt: TensorFormat, rows: int, cols: int) -> VQTensor:
    """A tensor of jax.ShapeDtypeStruct."""
    grid = fmt.grid(rows, cols)
    strip = random_tensor(fmt, dataclasses.replace(grid, rows=grid.strip_rows))  # one row strip

    def with_rows(axis, size):
        def change(array):
            shape = list(array.shape)
            if array.ndim > axis:
                shape[axis] = size
            return jax.ShapeDtypeStruct(shape, array.dtype)

        return change

    return dataclasses.replace(
        strip,
        grid=grid,
        codes=with_rows(1, rows)(strip.codes),
        codebook=jax.tree.map(with_rows(2, grid.row_strips), strip.codebook),
    )


@functools.cache
def trellis_tensor(window_bits: int, level_bits: int = 0) -> TrellisTensor:
    """4096 x 4096 weights of all rates from 0 to 6, as arrays: their sizes depend on the rates."""
    return random_trellis(4096, 4096, window_bits, 256, outliers=4096, level_bits=level_bits)


def first_device(topology: Any) -> NamedSharding:
    """Placement on one device of a topology that is described, not there."""
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("device",)), PartitionSpec())


def placed(tree: Any, sharding: NamedSharding) -> Any:
    """Abstract arrays of the shapes of a tree's, at a place."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)
