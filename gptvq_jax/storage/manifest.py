"""What manifest.json says of a checkpoint, and whether it fits the model that it names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptvq_jax.console.errors import brief
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.shapes import block_shapes, module_path, outer_shapes
from gptvq_jax.storage.tree_record import Record, check_fields, check_metas, same

_FIELDS = (
    "format",
    "format_version",
    "config",
    "model",
    "source",
    "bits_per_value",
    "quantized_bytes",
    "dense_bytes",
    "layers",
    "dense",
)
_LATER_FIELDS = ("embedding_bytes", "embeddings")  # since embeddings can be int8
KEPT_DENSE = "kept_dense"  # names of dense layers that count in bits_per_value; absent: none do


def listed(record: Record, prefix: str) -> dict[str, dict[str, Any]]:
    """The entries of the manifest for one stored tree, by section; `prefix` is '' for outer/."""
    quantized = {prefix + n.removesuffix("/kernel"): m for n, m in record["quantized"].items()}
    dense = {prefix + name: meta for name, meta in record["dense"].items()}
    return {"layers" if prefix else "embeddings": quantized, "dense": dense}


def counts(
    sections: Mapping[str, Mapping[str, Any]], kept_dense: Sequence[str] = ()
) -> dict[str, Any]:
    """Bytes and bits of the three sections of a manifest: layers, embeddings and dense.

    Args:
      sections: of the manifest.
      kept_dense: names of layers in section dense that count among the bits per value.
    """
    sizes = {
        section: sum(meta["num_bytes"] for meta in metas.values())
        for section, metas in sections.items()
    }
    counted = [*sections["layers"].values()]
    counted += [sections["dense"][f"{name}/kernel"] for name in kept_dense]
    weights = sum(math.prod(meta["shape"]) for meta in counted)
    num_bytes = sum(meta["num_bytes"] for meta in counted)
    return {
        "bits_per_value": 8 * num_bytes / weights if weights else None,
        "quantized_bytes": sizes["layers"],
        "embedding_bytes": sizes["embeddings"],
        "dense_bytes": sizes["dense"],
    }


def check_manifest(manifest: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises ValueError if it is not that of a packed model of `config`.

    Its format and version have been checked, and `config` is what its field "model" says; the
    caller names the file.
    """
    later = _LATER_FIELDS if any(name in manifest for name in _LATER_FIELDS) else ()
    kept = (KEPT_DENSE,) if KEPT_DENSE in manifest else ()
    check_fields(manifest, (*_FIELDS, *later, *kept))
    for name in ("config", "source", "layers", "dense", *later[1:]):
        if not isinstance(manifest[name], dict):
            raise ValueError(f"{name}={brief(manifest[name])} must be an object")
    check_fields(manifest["source"], ("name", "fingerprint"))
    for name, value in manifest["source"].items():
        if not isinstance(value, str):
            raise ValueError(f"source.{name}={brief(value)} must be a string")
    sections = {name: manifest.get(name, {}) for name in ("layers", "embeddings", "dense")}
    _check_leaves(sections, config)
    kept_dense = manifest.get(KEPT_DENSE, [])
    _check_kept_dense(kept_dense, sections["dense"])
    for name, value in counts(sections, kept_dense).items():
        if name in manifest and not same(manifest[name], value):
            raise ValueError(f"{name} is {brief(manifest[name])}, but what is listed makes {value}")


def check_shapes(record: Record, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if a checked record does not list exactly the leaves of `shapes`."""
    names = record["quantized"].keys() | record["dense"].keys()
    if missing := sorted(shapes.keys() - names):
        raise ValueError(f"{missing[0]} is missing")
    if unknown := sorted(names - shapes.keys()):
        raise ValueError(f"{brief(unknown[0])} is not part of the model")
    for name, meta in record["quantized"].items():
        _check_shape(name, meta, shapes[name])
    for name, meta in record["dense"].items():
        # Dense kernels are (in, out), as in Flax.
        shape = shapes[name][::-1] if name.endswith("/kernel") else shapes[name]
        _check_shape(name, meta, shape)


def leaf_shapes(config: ModelConfig, outer: bool) -> dict[str, tuple[int, ...]]:
    """{name of a leaf of outer/, or of a block: its shape, (out, in) of a kernel}.

    `config` is that of the block.
    """
    if not outer:
        return {_leaf_name(name): shape for name, shape in block_shapes(config).items()}
    shapes = {name.removeprefix("model."): shape for name, shape in outer_shapes(config).items()}
    return {_leaf_name(name): shape for name, shape in shapes.items()}


def _check_leaves(sections: Mapping[str, Mapping[str, Any]], config: ModelConfig) -> None:
    """Compares a manifest's sections with the model, as one record of all its leaves."""
    outer, of_blocks = leaf_shapes(config, outer=True), config.block_counts()
    shapes_of = {block: leaf_shapes(block, outer=False) for block in of_blocks}
    depth, count = config.num_hidden_layers, sum(map(len, sections.values()))
    wanted = sum(number * len(shapes_of[block]) for block, number in of_blocks.items())
    if count != len(outer) + wanted:  # first: a depth can be any number
        raise ValueError(f"{count} weights are listed, which {depth} blocks do not have")
    check_metas({**sections["layers"], **sections["embeddings"]}, sections["dense"])
    shapes = dict(outer)
    for index in range(depth):
        block = shapes_of[config.of_block(index)]
        shapes |= {f"layers_{index}/{name}": shape for name, shape in block.items()}

    def leaf(name: str) -> str:
        return name if name in shapes else f"{name}/kernel"

    if unknown := [name for name in sections["embeddings"] if leaf(name) not in outer]:
        raise ValueError(f"{brief(unknown[0])} is not an embedding")
    if unknown := [name for name in sections["layers"] if leaf(name) in outer]:
        raise ValueError(f"{brief(unknown[0])} is not a layer of a block")
    quantized = {**sections["layers"], **sections["embeddings"]}
    leaves = {leaf(name): meta for name, meta in quantized.items()}
    check_shapes({"quantized": leaves, "dense": sections["dense"]}, shapes)


def _check_kept_dense(names: Any, dense: Mapping[str, Any]) -> None:
    """Raises ValueError unless these are names of dense layers of blocks, each once."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{KEPT_DENSE}={brief(names)} must be a list of names")
    layers = {name.removesuffix("/kernel") for name in dense if name.startswith("layers_")}
    for name in names:
        if name not in layers or f"{name}/kernel" not in dense or names.count(name) > 1:
            raise ValueError(f"{KEPT_DENSE}: {brief(name)} is no dense layer, or named twice")


def _check_shape(name: str, meta: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    if meta["shape"] != list(shape):
        raise ValueError(f"{name} has shape {brief(meta['shape'])}, the model's is {list(shape)}")


def _leaf_name(name: str) -> str:
    """Of a Hugging Face name: self_attn.q_proj.weight -> self_attn/q_proj/kernel."""
    if name.endswith(".bias"):
        return name.replace(".", "/")
    path = module_path(name.removesuffix(".weight"))
    last = path.rpartition("/")[2]
    kind = "embedding" if last == "embed_tokens" else "scale" if last.endswith("norm") else "kernel"
    return f"{path}/{kind}"
