"""One program on several devices, each with rows of its own: `jax.jit(jax.shard_map(...))`.

That is what `jax.pmap` is made of today. Weights are cut by rows; Hessians and their factors are on
every device, for each column of a sweep needs them. Where a program sums nothing over rows, what a
device finds has the bits that one device alone finds.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptvq_jax.core.grid import GroupGrid, over_devices
from gptvq_jax.core.mesh import own_mesh
from gptvq_jax.core.vq_tensor import VQTensor

Tree = Any


@partial(jax.jit, static_argnames=("function", "static", "mesh"))
def program(
    function: Callable[..., Tree], static: tuple, mesh: Mesh, own: Tree, shared: Tree
) -> Tree:
    """What a function of arrays makes on every device of a mesh.

    Args:
      function: (*own of a device, *shared, *static) -> a pytree of arrays.
      static: hashable.
      mesh: of one axis.
      own: tuple of pytrees with an axis in front that has an entry for each device.
      shared: tuple of pytrees, the same on all.

    Returns:
      The pytree with such an axis in front.
    """
    by_device, on_all = PartitionSpec(mesh.axis_names[0]), PartitionSpec()

    def here(own, shared):
        found = function(*jax.tree.map(lambda x: x[0], own), *shared, *static)
        return jax.tree.map(lambda x: x[None], found)

    specs = {"in_specs": (by_device, on_all), "out_specs": by_device}
    # Not checked: what is a sum over devices, and so the same on all, is given back by each.
    return jax.shard_map(here, mesh=mesh, **specs, check_vma=False)(own, shared)


def run(
    function: Callable[..., Tree], static: tuple, mesh: Mesh, own: Tree, shared: Tree
) -> list[Tree]:
    """Host arrays of what `program` makes, by device; its arguments may be anywhere."""
    of_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    own = put(own, of_device)
    shared = put(shared, NamedSharding(mesh, PartitionSpec()))
    found = program(function, static, mesh, own, shared)
    if of_device.is_fully_addressable:
        found = jax.device_get(found)
    else:
        found = multihost_utils.process_allgather(found, tiled=True)
    return [jax.tree.map(lambda x, k=k: x[k], found) for k in range(mesh.size)]


def put(tree: Tree, sharding: NamedSharding) -> Tree:
    """Arrays on the devices of a mesh; where some are other processes', each process has them."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def parts(array: Any) -> jax.Array:
        if getattr(array, "sharding", None) == sharding:
            return array
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            data = parts(jax.random.key_data(array))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(lambda x: parts(x if hasattr(x, "dtype") else np.asarray(x)), tree)


def first_of(mesh: Mesh, count: int) -> Mesh:
    """The first devices of a mesh of one axis."""
    return Mesh(mesh.devices[:count], mesh.axis_names, axis_types=mesh.axis_types)


def enough(mesh: Mesh, parts: int) -> Mesh:
    """The mesh, or that of this process where parts are too few for all devices.

    A program has work for all processes or for one: then each of them does the same.
    """
    each = -(-parts // mesh.size)
    return mesh if jax.process_count() == 1 or -(-parts // each) == mesh.size else own_mesh()


def cut_rows(rows: jax.Array, devices: int, each: int, value: float = 0.0) -> jax.Array:
    """Rows (R, ...) as (devices, each, ...), with a value in the padding."""
    pad = [(0, devices * each - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, pad, constant_values=value).reshape(devices, each, *rows.shape[1:])


def quantize_rows(
    function: Callable[..., VQTensor],
    settings: Any,
    mesh: Mesh,
    weight: jax.Array,
    grid: GroupGrid,
    shared: Tree,
) -> VQTensor:
    """A weight (R, C) whose rows are spread over the devices: whole strips, where it has several.

    Args:
      function: (weight, first strip, *shared, settings, grid) -> tensor, of the rows of a device.
      settings: of the method, hashable.
      mesh: of one axis; of devices that have no rows none is used.
      weight: (R, C).
      grid: of the whole.
      shared: tuple of pytrees.
    """
    mesh = enough(mesh, grid.rows if grid.row_strips == 1 else grid.row_strips)
    part, used = over_devices(grid, mesh.size, mesh.axis_names[0])
    strips = 0 if part.shared else part.row_strips
    own = cut_rows(weight, used, part.rows), strips * np.arange(used)
    return _joined(run(function, (settings, part), first_of(mesh, used), own, shared), grid)


def quantize_parts(
    function: Callable[..., VQTensor],
    settings: Any,
    mesh: Mesh,
    weight: jax.Array,
    parts: tuple[GroupGrid, range],
    shared: Tree,
) -> list[VQTensor]:
    """The parts of a weight that one device would quantize one by one, to the same bits.

    Arguments are those of `quantize_rows`, and parts those of `GPTVQSettings.parts`.
    """
    grid, first_rows = parts
    mesh = enough(mesh, len(first_rows))
    rounds = -(-len(first_rows) // mesh.size)
    used = -(-len(first_rows) // rounds)
    weights = weight.reshape(len(first_rows), grid.rows, -1)
    found = []
    for start in range(0, len(first_rows), used):
        # The last round goes through the last part again where there are too few.
        chosen = np.minimum(np.arange(start, start + used), len(first_rows) - 1)
        own = weights[chosen], chosen * grid.row_strips
        found += run(function, (settings, grid), first_of(mesh, used), own, shared)
    return found[: len(first_rows)]


def _joined(parts: Sequence[VQTensor], grid: GroupGrid) -> VQTensor:
    """The tensor whose rows have been quantized on several devices, without the padding."""
    first = parts[0]

    def rows(arrays, axis):
        return np.take(np.concatenate(arrays, axis), np.arange(grid.rows), axis)

    def strips(*arrays):  # axis 2 of (M, S, G, ...); of the others every device has the same
        if grid.row_strips == 1 or arrays[0].ndim < 3:
            return arrays[0]
        return np.concatenate(arrays, axis=2)[:, :, : grid.row_strips]

    blocks = first.block_scales
    if blocks is not None:
        codes = rows([part.block_scales.codes for part in parts], 0)
        blocks = dataclasses.replace(blocks, codes=codes)
    return dataclasses.replace(
        first,
        codes=rows([part.codes for part in parts], 1),
        codebook=jax.tree.map(strips, *(part.codebook for part in parts)),
        block_scales=blocks,
        row_scales=None
        if first.row_scales is None
        else rows([part.row_scales for part in parts], 0),
        grid=grid,
    )
