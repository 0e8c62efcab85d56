"""Weights on huge pages, where the system has them.

A token reads all weights once. In pages of 4 KiB each is some ten thousand steps to an address that
the processor has to look up first; pages of 2 MiB are few enough to be remembered.
"""

import mmap
from typing import Any

import jax
import numpy as np

_PAGE = 2 << 20  # bytes of a huge page
_LINE = 64  # bytes that an array must begin at a multiple of, or JAX copies it


def on_huge_pages(tree: Any) -> Any:
    """Moves the arrays of a tree on a CPU side by side to memory of huge pages.

    Args:
      tree: its leaves are arrays of one device. Where nobody else holds them they are freed one by
        one, so that the tree is never in memory twice.

    Returns:
      The tree with the moved arrays; itself on other devices, where the system has no huge pages,
      and where all arrays together do not fill one.
    """
    leaves, structure = jax.tree.flatten(tree)
    del tree
    size = sum(_room(leaf) for leaf in leaves)
    if jax.default_backend() != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size < _PAGE:
        return jax.tree.unflatten(structure, leaves)
    memory = mmap.mmap(-1, size + _PAGE)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return jax.tree.unflatten(structure, leaves)
    place = np.frombuffer(memory, np.uint8)
    place = place[-place.ctypes.data % _PAGE :]  # from the beginning of a page
    for index, leaf in enumerate(leaves):
        if _room(leaf):
            moved = place[: leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
            moved[...] = leaf
            leaves[index] = jax.device_put(moved, may_alias=True)
            place = place[_room(leaf) :]
    return jax.tree.unflatten(structure, leaves)


def _room(leaf: Any) -> int:
    """Bytes that it takes there; 0: it stays where it is."""
    return -(-leaf.nbytes // _LINE) * _LINE if isinstance(leaf, jax.Array) else 0
