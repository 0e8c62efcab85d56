"""The devices of this process as a mesh of one axis, which every pass spreads its work over.

`jax.jit(jax.shard_map(...))` on such a mesh is what `jax.pmap` is made of today. One device is a
mesh too: of size 1.
"""

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


def local_mesh() -> Mesh:
    """Of the devices that this process works on."""
    count = _chosen[0] if _chosen else len(jax.local_devices())
    return jax.make_mesh((count,), (AXIS,), (AxisType.Auto,), devices=jax.local_devices()[:count])
