"""Rotary embeddings of families that have one for blocks with a window and one for the others."""

from collections.abc import Mapping
from typing import Any

from gptvq_jax.console.errors import brief
from gptvq_jax.models.fields import OBJECT, ROPE_BASE
from gptvq_jax.models.rope_scaling import RopeScaling, read_rope, write_rope

SLIDING, FULL = "sliding_attention", "full_attention"  # as `layer_types` names the blocks


def read_ropes(
    hf: Mapping[str, Any], max_positions: int, bases: Mapping[str, tuple[str, float]]
) -> dict[str, tuple[float, RopeScaling | None]]:
    """{SLIDING or FULL: (theta, scaling)} as transformers 5 reads them.

    `rope_parameters` has an object for each; a `rope_scaling` is of blocks without a window only.

    Args:
      hf: dict of a config.json.
      max_positions: its max_position_embeddings, as it says or by default.
      bases: {SLIDING or FULL: (field of theta where `rope_parameters` has none, its default)}.

    Raises:
      ValueError: a field holds what it cannot hold, or `rope_parameters` does not say of which
        blocks it is.
      NotImplementedError: a type of stretch that is not implemented.
    """
    given = OBJECT.optional().read(hf, "rope_parameters") or {}
    if given and not {SLIDING, FULL} & set(given):
        raise ValueError(
            f"rope_parameters must hold one object for {FULL!r} and one for {SLIDING!r}, "
            f"got {brief(given)}"
        )
    ropes = {}
    for kind, (flat, base) in bases.items():
        rope = dict(OBJECT.optional().read(given, kind) or {})
        if kind == FULL:
            rope |= OBJECT.optional().read(hf, "rope_scaling") or {}
        if rope.get("rope_theta") is None:
            rope["rope_theta"] = ROPE_BASE.optional(base).read(hf, flat) or base
        theta, scaling, share = read_rope({"rope_parameters": rope}, max_positions)
        if share != 1:
            raise NotImplementedError("partial_rotary_factor is not supported, only 1")
        ropes[kind] = theta, scaling
    return ropes


def write_ropes(config: Any, local_base: str | None = None) -> dict[str, Any]:
    """The inverse of `read_ropes`, for the kinds of blocks that a ModelConfig has.

    Args:
      config: the ModelConfig.
      local_base: the field of theta of blocks with a window, if they have one of their own.
    """
    of_kind = {SLIDING if kind.sliding_window else FULL: kind for kind in config.kinds}
    hf = {"rope_scaling": None}  # which is never that of blocks with a window
    if FULL in of_kind:
        hf["rope_theta"] = of_kind[FULL].rope_theta
        hf["rope_scaling"] = write_rope(of_kind[FULL].rope_scaling)
    if SLIDING in of_kind:
        if local_base is not None:
            hf[local_base] = of_kind[SLIDING].rope_theta
        if local_base is None or of_kind[SLIDING].rope_scaling is not None:
            hf["rope_parameters"] = {
                name: {
                    **(write_rope(kind.rope_scaling) or {"rope_type": "default"}),
                    "rope_theta": kind.rope_theta,
                }
                for name, kind in of_kind.items()
            }
    return hf
