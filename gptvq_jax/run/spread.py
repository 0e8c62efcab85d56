"""A batch of windows over the devices of this process: each takes its share through one program.

The program is `jax.jit` of `jax.shard_map`, which is what `jax.pmap` is made of today. Parameters
are on all devices. A sum over tokens is kept apart on each, as a leading axis of the partial sums,
and added up once, by `total`: a batch costs no communication. Where devices do not divide a batch,
windows of zeros fill it, which nothing counts. On one device a function is called as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptvq_jax.core.mesh import AXIS, local_mesh

Tree = Any
# (static, shared, windows, sums) -> what it makes of the windows, and the sums.
Function = Callable[[tuple, Tree, Tree, Tree], tuple[Tree, Tree]]


def num_devices() -> int:
    """That a batch is spread over."""
    return local_mesh().size


def padding(count: int) -> int:
    """Windows of zeros that fill a batch of `count`."""
    return -count % num_devices()


def real(count: int) -> np.ndarray | None:
    """1 for each of `count` windows and 0 for each that fills the batch; None: nothing does."""
    missing = padding(count)
    return np.repeat(np.float32([1, 0]), [count, missing]) if missing else None


def line(*counts: int) -> str | None:
    """What several devices share in a run with so many windows of each kind; None: there is one."""
    devices = num_devices()
    if devices == 1:
        return None
    missing = sum(map(padding, counts))
    filled = f"; {missing} windows of zeros fill the last batches" if missing else ""
    return f"{devices} devices share the rows of every layer and the windows of every batch{filled}"


def on_all(tree: Tree) -> Tree:
    """Parameters on all devices; as they are where there is one."""
    mesh = local_mesh()
    return tree if mesh.size == 1 else jax.device_put(tree, NamedSharding(mesh, P()))


def run(function: Function, static: tuple, shared: Tree, windows: Tree, sums: Tree = None) -> Any:
    """Takes a batch through a function.

    Args:
      function: of a module, by which it is known; its outputs have the windows first.
      static: what a program is compiled for.
      shared: arrays that all windows need, best as `on_all` has put them.
      windows: arrays with an axis of windows first, of equal length; Nones among them.
      sums: that the function adds to, as `partial_sums` has made them; they are given up.

    Returns:
      Its outputs, of as many windows, and the sums.
    """
    mesh = local_mesh()
    if mesh.size == 1:
        return function(static, shared, windows, sums)
    count = len(jax.tree.leaves(windows)[0])
    spread = NamedSharding(mesh, P(AXIS))
    parts = jax.tree.map(lambda array: jax.device_put(_filled(array), spread), windows)
    made, sums = _program(function, static, mesh)(on_all(shared), parts, sums)
    return jax.tree.map(lambda array: array[:count], made), sums


def partial_sums(sums: Tree) -> Tree:
    """Zeros in the shape of some sums, for each device its own; `sums` themselves on one."""
    mesh = local_mesh()
    if mesh.size == 1:
        return sums
    place = NamedSharding(mesh, P(AXIS))
    return jax.tree.map(
        lambda of: jax.device_put(np.zeros((mesh.size, *of.shape), of.dtype), place), sums
    )


def total(sums: Tree) -> Tree:
    """Partial sums added up: one `psum`, on the first device."""
    mesh = local_mesh()
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


def _filled(array: Any) -> Any:
    missing = padding(len(array))
    if not missing:
        return array
    module = np if isinstance(array, np.ndarray) else jnp
    return module.concatenate([array, module.zeros((missing, *array.shape[1:]), array.dtype)])
