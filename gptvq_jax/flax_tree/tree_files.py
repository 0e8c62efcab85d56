"""A tree with packed kernels on the disk.

tree/          as every stored tree (storage/tree_io.py), each matrix a quantized tensor
kernels.json   how matrices make kernels, and dtypes; written last: its presence means complete
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from gptvq_jax.console.errors import brief
from gptvq_jax.console.json_file import read_own_object
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.flax_tree.kernel import Layout, PackedKernel, is_packed
from gptvq_jax.flax_tree.models import named_leaves
from gptvq_jax.storage.tree_io import load_tree, save_tree, write_json
from gptvq_jax.storage.tree_record import ARRAYS, DENSE_DTYPES, RECORD

_FILE, _TREE = "kernels.json", "tree"
_VERSION = 1


def save(directory: str | os.PathLike, tree: Any) -> None:
    """Writes a tree whose leaves are packed kernels and floating-point arrays.

    Args:
      directory: to be made, or of a tree that is replaced.
      tree: such as `gptvq_jax.quantize` returns. Of an NNX state with counters or keys of random
        numbers: its parameters alone, `nnx.filter_state(state, nnx.Param)`.

    Raises:
      ValueError: a leaf is of another type; or the directory has files that are no tree.
      FullDiskError: there is no room.
    """
    directory, stored, kernels, dtypes = Path(directory).absolute(), {}, {}, {}
    for name, leaf in named_leaves(tree):
        if is_packed(leaf):
            kernels[name] = _described(name, leaf)
            names = _names(name, leaf.layout)
            stored |= dict(zip(names, leaf.tensors, strict=True))
        else:
            dtype = str(getattr(leaf, "dtype", type(leaf).__name__))
            if dtype not in DENSE_DTYPES:
                raise ValueError(
                    f"{name} is {dtype}, not one of {', '.join(DENSE_DTYPES)}; save the parameters "
                    "alone, such as nnx.filter_state(state, nnx.Param)"
                )
            stored[name], dtypes[name] = leaf, dtype
    _check_own(directory)
    one = set(dtypes.values())
    (directory / _FILE).unlink(missing_ok=True)
    nested = traverse_util.unflatten_dict(stored, sep="/")
    save_tree(directory / _TREE, nested, one.pop() if len(one) == 1 else "float32")
    write_json(
        directory / _FILE, {"format_version": _VERSION, "kernels": kernels, "dtypes": dtypes}
    )


def _check_own(directory: Path) -> None:
    """Nothing but a tree, or what a stopped `save` left of one, is replaced."""
    places = {directory: (_FILE, _TREE), directory / _TREE: (ARRAYS, RECORD)}
    for place, names in places.items():
        for path in place.iterdir() if place.is_dir() else ():
            if not path.name.startswith(names):
                raise ValueError(f"{path} is of no tree, and would be lost; name a new directory")


def load(directory: str | os.PathLike, like: Any = None) -> Any:
    """The tree that `save` wrote, on the device.

    Args:
      directory: of the tree.
      like: a tree of the same names, for its structure, such as `nnx.state(model)`, whose leaves
        are kept where none was stored; None: nested dicts, as Linen has them.

    Raises:
      FileNotFoundError: there is no finished tree.
      ValueError: it is damaged, or has a leaf for which there is no place in `like`.
    """
    directory = Path(directory).absolute()  # Orbax takes no other
    if not (directory / _FILE).exists():
        raise FileNotFoundError(
            f"{directory} holds no finished tree; check the path, or save again"
        )
    nested, _ = load_tree(directory / _TREE)
    stored = traverse_util.flatten_dict(nested, sep="/")
    try:
        leaves = _leaves(stored, read_own_object(directory / _FILE))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{directory / _FILE} is damaged: {brief(str(error))}; restore it"
        ) from None
    leaves = jax.tree.map(jnp.asarray, leaves)
    return traverse_util.unflatten_dict(leaves, sep="/") if like is None else _fill(like, leaves)


def _fill(like: Any, leaves: dict[str, Any]) -> Any:
    names = [name for name, _ in named_leaves(like)]
    if unknown := sorted(leaves.keys() - set(names)):
        raise ValueError(f"like has no place for {unknown[0]}; give the tree of the same model")
    old, structure = jax.tree.flatten(like, is_leaf=is_packed)
    new = [leaves.get(name, leaf) for name, leaf in zip(names, old, strict=True)]
    return jax.tree.unflatten(structure, new)


def _described(name: str, kernel: PackedKernel) -> dict[str, Any]:
    if not all(isinstance(tensor, QuantizedTensor) for tensor in kernel.tensors):
        raise ValueError(f"{name} is a kernel of flax_tree.ready; save the tree it was made of")
    axes = kernel.layout._asdict()
    fields = {field: [int(n) for n in values] for field, values in axes.items()}
    return fields | {"dtype": str(jnp.dtype(kernel.dtype))}


def _names(name: str, layout: Layout) -> list[str]:
    return [name] if layout.count == 1 else [f"{name}/{i}" for i in range(layout.count)]


def _leaves(stored: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Leaves by name of what is stored, each of which the record must know."""
    if record["format_version"] != _VERSION:
        raise ValueError(f"format_version={record['format_version']!r}, and {_VERSION} is read")
    leaves = {}
    for name, fields in record["kernels"].items():
        layout = _layout(fields)
        tensors = tuple(stored.pop(part) for part in _names(name, layout))
        for tensor in tensors:
            if not isinstance(tensor, QuantizedTensor) or tensor.shape != layout.matrix:
                raise ValueError(f"the matrices of {name} are not {layout.matrix}")
        leaves[name] = PackedKernel(tensors, layout, jnp.dtype(DENSE_DTYPES[fields["dtype"]]))
    for name, dtype in record["dtypes"].items():
        leaves[name] = stored.pop(name).astype(DENSE_DTYPES[dtype])
    if stored:
        raise ValueError(f"{min(stored)} is not in it")
    return leaves


def _layout(fields: dict[str, Any]) -> Layout:
    layout = Layout(*(tuple(fields[name]) for name in Layout._fields))
    axes = (*layout.batch_axes, *layout.in_axes)
    if not all(type(n) is int and n > 0 for n in layout.shape):
        raise ValueError(f"shape={layout.shape} must be sizes")
    if len(set(axes)) < len(axes) or not set(axes) <= set(range(len(layout.shape))):
        raise ValueError(f"axes {axes} must be different ones of {len(layout.shape)}")
    return layout
