"""The devices as a mesh of one axis, which every pass spreads its work over: those of this process,
and, where several processes work together (`jax.distributed`), those of all.

`jax.jit(jax.shard_map(...))` on such a mesh is what `jax.pmap` is made of today. One device is a
mesh too: of size 1.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

AXIS = "devices"
_chosen: list[int] = []  # how many, once a script has said so


def use_devices(count: int) -> None:
    """Lets this process work on the first `count` of its devices; 0: all of them, the default.

    Raises:
      ValueError: there are not so many.
    """
    there = len(jax.local_devices())
    if not 0 <= count <= there:
        raise ValueError(
            f"devices={count} must be 1 to {there}, the devices of this process, or 0 for all; a "
            f"CPU shows several under XLA_FLAGS=--xla_force_host_platform_device_count=8"
        )
    _chosen[:] = [count] if count else []


def work_mesh() -> Mesh:
    """Of all devices that work together, those of one process side by side."""
    return _mesh(range(jax.process_count()))


def own_mesh() -> Mesh:
    """Of the devices of this process."""
    return _mesh([jax.process_index()])


def _mesh(processes: Sequence[int]) -> Mesh:
    by_process = [[d for d in jax.devices() if d.process_index == p] for p in processes]
    count = _chosen[0] if _chosen else len(jax.local_devices())
    devices = [device for own in by_process for device in own[:count]]
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
