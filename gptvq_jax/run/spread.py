"""A batch of windows over devices: each takes its share through one program.

The program is `jax.jit` of `jax.shard_map`, which is what `jax.pmap` is made of today. Parameters
are on all devices. A sum over tokens is kept apart on each, as a leading axis of the partial sums,
and added up once, by `total`: a batch costs no communication. Where devices do not divide a batch,
windows of zeros fill it, which nothing counts. On one device a function is called as it is.

Several processes share a batch too: each reads the windows of its own devices, `mine`, and gets
what is made of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptvq_jax.core.mesh import AXIS, work_mesh
from gptvq_jax.methods.devices import put

Tree = Any
# (static, shared, windows, sums) -> what it makes of the windows, and the sums.
Function = Callable[[tuple, Tree, Tree, Tree], tuple[Tree, Tree]]


def num_devices() -> int:
    """That a batch is spread over."""
    return work_mesh().size


def padding(count: int) -> int:
    """Windows of zeros that fill a batch of `count`."""
    return -count % num_devices()


def mine(part: slice) -> slice:
    """The windows of a batch that this process has: all of them, where it is alone."""
    share = _share(part.stop - part.start)
    start = min(part.start + jax.process_index() * share, part.stop)
    return slice(start, min(start + share, part.stop))


def real(part: slice) -> np.ndarray | None:
    """1 for each window of `mine` and 0 for each that fills the batch; None: nothing does."""
    count, own = part.stop - part.start, mine(part)
    if not padding(count):
        return None
    here = own.stop - own.start
    return np.repeat(np.float32([1, 0]), [here, _share(count) - here])


def joined(array: np.ndarray) -> np.ndarray:
    """Of an array with windows first, of which each process has filled its own, others being 0."""
    if jax.process_count() == 1:
        return array
    return multihost_utils.process_allgather(array).sum(0, dtype=array.dtype)


def _share(count: int) -> int:
    """Windows of each process in a batch of `count`, those that fill it included."""
    return (count + padding(count)) // jax.process_count()


def line(*counts: int) -> str | None:
    """What several devices share in a run with so many windows of each kind; None: there is one."""
    devices = num_devices()
    if devices == 1:
        return None
    missing = sum(map(padding, counts))
    filled = f"; {missing} windows of zeros fill the last batches" if missing else ""
    processes = jax.process_count()
    who = f"{devices} devices" + (f" of {processes} processes" if processes > 1 else "")
    return f"{who} share the rows of every layer and the windows of every batch{filled}"


def on_all(tree: Tree) -> Tree:
    """Parameters on all devices; as they are where there is one."""
    mesh = work_mesh()
    return tree if mesh.size == 1 else put(tree, NamedSharding(mesh, P()))


def run(
    function: Function,
    static: tuple,
    shared: Tree,
    windows: Tree,
    sums: Tree = None,
    *,
    part: slice,
) -> Any:
    """Takes a batch through a function.

    Args:
      function: of a module, by which it is known; its outputs have the windows first.
      static: what a program is compiled for.
      shared: arrays that all windows need, best as `on_all` has put them.
      windows: arrays with an axis of windows first, those of `mine(part)`; Nones among them.
      sums: that the function adds to, as `partial_sums` has made them; they are given up.
      part: the batch among all windows.

    Returns:
      Its outputs, of as many windows, and the sums.
    """
    mesh = work_mesh()
    if mesh.size == 1:
        return function(static, shared, windows, sums)
    place, share, own = NamedSharding(mesh, P(AXIS)), _share(part.stop - part.start), mine(part)

    def placed(array: Any) -> jax.Array:
        filled = _filled(array, share)
        if place.is_fully_addressable:
            return jax.device_put(filled, place)
        return jax.make_array_from_process_local_data(place, np.asarray(filled))

    parts = jax.tree.map(placed, windows)
    made, sums = _program(function, static, mesh)(on_all(shared), parts, sums)
    return jax.tree.map(lambda array: _own(array)[: own.stop - own.start], made), sums


def _own(array: jax.Array) -> jax.Array | np.ndarray:
    """What the devices of this process have of an array, one behind the other."""
    if array.is_fully_addressable:
        return array
    parts = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in parts])


def partial_sums(sums: Tree) -> Tree:
    """Zeros in the shape of some sums, for each device its own; `sums` themselves on one."""
    mesh = work_mesh()
    if mesh.size == 1:
        return sums
    zeros = jax.tree.map(lambda of: np.zeros((mesh.size, *of.shape), of.dtype), sums)
    return put(zeros, NamedSharding(mesh, P(AXIS)))


def total(sums: Tree) -> Tree:
    """Partial sums added up: one `psum`, on the first device."""
    mesh = work_mesh()
    if mesh.size == 1:
        return sums
    return jax.tree.map(lambda array: array.addressable_data(0), _total(mesh)(sums))


@functools.cache
def _program(function: Function, static: tuple, mesh: Mesh) -> Callable[..., Any]:
    def part(shared, windows, sums):
        made, own = function(static, shared, windows, jax.tree.map(lambda of: of[0], sums))
        return made, jax.tree.map(lambda of: of[None], own)

    return jax.jit(_over(mesh, part, (P(), P(AXIS), P(AXIS)), P(AXIS)), donate_argnums=2)


@functools.cache
def _total(mesh: Mesh) -> Callable[[Tree], Tree]:
    def added(sums):
        return jax.tree.map(lambda of: lax.psum(of[0], AXIS), sums)

    return jax.jit(_over(mesh, added, (P(AXIS),), P()))


def _over(mesh: Mesh, function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _filled(array: Any, share: int) -> Any:
    missing = share - len(array)
    if not missing:
        return array
    module = np if isinstance(array, np.ndarray) else jnp
    return module.concatenate([array, module.zeros((missing, *array.shape[1:]), array.dtype)])
