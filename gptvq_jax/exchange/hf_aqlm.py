"""Writes a packed checkpoint as a packed model that transformers loads with the aqlm package."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from gptvq_jax.exchange.aqlm_format import AQLMFormat, aqlm_format
from gptvq_jax.exchange.hf_layout import module_name, write_model
from gptvq_jax.models.families.base import Family
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.tensor_io import abstract_tensor


def hf_aqlm(
    checkpoint: PackedCheckpoint,
    output_dir: str | os.PathLike,
    dtype: str = "float16",
    shard_bytes: int = 2 * 10**9,
    on_block: Callable[[], None] = lambda: None,
) -> None:
    """Writes the packed model as transformers loads it with the aqlm package (aqlm_format.py).

    Arguments are those of `hf_dense`, but for this one.

    Args:
      dtype: of what is not quantized, and the one in which transformers computes by default.

    Raises:
      NotImplementedError: a layer does not fit the format; says which, why, and what does.
      ValueError: `output_dir` is in use or cannot be written, or a value overflows its dtype.
    """
    extra = {"quantization_config": _quantization_config(checkpoint)}
    write_model(
        checkpoint, output_dir, extra, checkpoint.packed_block, dtype, shard_bytes, on_block
    )


def _quantization_config(checkpoint: PackedCheckpoint) -> dict[str, Any]:
    """What config.json says of the layers, once all are known to fit; reads no array."""
    fmt = _common_format(checkpoint.manifest["layers"], checkpoint.config.family)
    dense = [module_name(name) for name in checkpoint.manifest["dense"] if name.endswith("/kernel")]
    linear = sorted({*dense, "lm_head"})  # a tied head is a linear layer of its own in transformers
    return {
        "quant_method": "aqlm",
        "num_codebooks": fmt.num_codebooks,
        "nbits_per_codebook": fmt.index_bits,
        "in_group_size": fmt.dim,
        "out_group_size": 1,
        # Transformers 4 looks for names of weights, version 5 for names of modules.
        "linear_weights_not_to_quantize": [*linear, *(f"{name}.weight" for name in linear)],
    }


def _common_format(layers: Mapping[str, Any], family: Family) -> AQLMFormat:
    """The format of all quantized layers, from their descriptions in the manifest."""
    way_out = "or export with --format=hf-dense"
    if fused := list(family.fused):
        raise NotImplementedError(
            f"model_type {family.model_type!r} stores {', '.join(fused)} as one layer each, which "
            "the format cannot hold once they are quantized apart; export with --format=hf-dense"
        )
    if family.experts is not None:
        raise NotImplementedError(
            f"model_type {family.model_type!r} has experts, whose layers transformers keeps in one "
            "array, which the format cannot hold; export with --format=hf-dense"
        )
    formats: dict[str, AQLMFormat] = {}
    for name, meta in layers.items():
        try:
            formats[name] = aqlm_format(abstract_tensor(meta))
        except NotImplementedError as error:
            raise NotImplementedError(f"{name} {error}, {way_out}") from None
        first, fmt = next(iter(formats.items()))
        if formats[name] != fmt:
            raise NotImplementedError(
                f"{name} has codebooks of {formats[name]}, {first} of {fmt}, and the format allows "
                "one kind; quantize without allocation.bits_per_value and with one method for all "
                f"layers, {way_out}"
            )
    if not formats:
        raise NotImplementedError("no layer is quantized; export with --format=hf-dense")
    return fmt
