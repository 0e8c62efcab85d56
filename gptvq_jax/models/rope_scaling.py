"""How a model stretches its rotary embeddings, as config.json says it and as numbers.

Each kind is a hashable dataclass whose fields are Hugging Face's; `None` stands for no stretch.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from gptvq_jax.console.errors import brief
from gptvq_jax.models.fields import FLAG, OBJECT, ROPE_BASE, ROPE_FACTOR, SIZE, TEXT, Field

_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = {
    "factor": ROPE_FACTOR,
    "low_freq_factor": ROPE_FACTOR,
    "high_freq_factor": ROPE_FACTOR,
    _ORIGINAL: SIZE,
}
_YARN = {
    "factor": ROPE_FACTOR,
    "attention_factor": ROPE_FACTOR,
    "beta_fast": ROPE_FACTOR,
    "beta_slow": ROPE_FACTOR,
    _ORIGINAL: SIZE,
}


class _Checked:
    """Checks every field that FIELDS names."""

    FIELDS: ClassVar[Mapping[str, Field]]

    def __post_init__(self):
        for name, field in self.FIELDS.items():
            field.check(f"rope_scaling.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling(_Checked):
    """All wavelengths are multiplied by `factor`."""

    factor: float
    ROPE_TYPE: ClassVar[str] = "linear"
    FIELDS: ClassVar = {"factor": ROPE_FACTOR}


@dataclasses.dataclass(frozen=True)
class DynamicRopeScaling(_Checked):
    """The base grows with the length of a text beyond max_position_embeddings ("dynamic NTK")."""

    factor: float
    ROPE_TYPE: ClassVar[str] = "dynamic"
    FIELDS: ClassVar = {"factor": ROPE_FACTOR}


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling(_Checked):
    """Llama 3.1's stretch of the rotary wavelengths beyond the pretraining context.

    Wavelengths (in positions) longer than `original_max_position_embeddings / low_freq_factor` are
    multiplied by `factor`, those shorter than `original_max_position_embeddings /
    high_freq_factor` are kept, and the ones between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    ROPE_TYPE: ClassVar[str] = "llama3"
    FIELDS: ClassVar = _LLAMA3

    def __post_init__(self):
        super().__post_init__()
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope_scaling.low_freq_factor must be < high_freq_factor, got {self}")


@dataclasses.dataclass(frozen=True)
class YarnRopeScaling(_Checked):
    """YaRN (arXiv 2309.00071): long wavelengths are stretched, scores sharpened.

    Pairs that turn more than `beta_fast` times within the original context are kept, those that
    turn less than `beta_slow` times are multiplied by `factor`, and a ramp over the index of the
    pair joins them, from and to whole indices with `truncate`. Cosines and sines are multiplied by
    `attention_factor`.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    ROPE_TYPE: ClassVar[str] = "yarn"
    FIELDS: ClassVar = _YARN | {"truncate": FLAG}


RopeScaling = LinearRopeScaling | DynamicRopeScaling | Llama3RopeScaling | YarnRopeScaling
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(
    hf: Mapping[str, Any], max_position_embeddings: int, rope_types: tuple[str, ...] = ROPE_TYPES
) -> tuple[float, RopeScaling | None, float]:
    """Returns (theta, scaling, share of a head that turns) as transformers 5 reads them.

    A `rope_scaling` that is not empty takes the place of `rope_parameters` as a whole. What neither
    says of theta the top level says.

    Args:
      hf: dict of a config.json.
      max_position_embeddings: as it says, or by default.
      rope_types: that its family has.

    Raises:
      ValueError: a field holds what it cannot hold.
      NotImplementedError: a type of stretch that is not implemented.
    """
    field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = OBJECT.optional().read(hf, field) or {}
    for name in (name for name, value in rope.items() if isinstance(value, Mapping)):
        raise NotImplementedError(
            f"{field} has parameters of its own for {brief(name)}, which is not supported"
        )
    theta = ROPE_BASE.optional().check(f"{field}.rope_theta", rope.get("rope_theta"))
    if theta is None:
        theta = ROPE_BASE.optional().read(hf, "rope_theta")
    theta = 10000.0 if theta is None else float(theta)
    share = rope.get("partial_rotary_factor")
    share = hf.get("partial_rotary_factor") if share is None else share
    share = 1.0 if share is None else _SHARE.check("partial_rotary_factor", share)
    # Early version 4 files call it "type".
    rope_type = TEXT.check(f"{field}.rope_type", rope.get("rope_type", rope.get("type", "default")))
    if rope_type not in rope_types:
        raise NotImplementedError(
            f"{field}.rope_type={brief(rope_type)} is not implemented, only {', '.join(rope_types)}"
        )
    if hf.get(_ORIGINAL) is not None:  # said at top level it counts more, as in transformers
        rope = {**rope, _ORIGINAL: hf[_ORIGINAL]}
    rope = {_ORIGINAL: max_position_embeddings, **rope}
    try:
        scaling = _READERS[rope_type](rope, max_position_embeddings)
    except ValueError as error:
        raise ValueError(f"{field} of rope_type {rope_type!r}: {error}") from None
    return theta, scaling, float(share)


def write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json, of which `read_rope` makes the same again."""
    if scaling is None:
        return None
    return {"rope_type": scaling.ROPE_TYPE, **dataclasses.asdict(scaling)}


_SHARE = Field(
    "a number above 0, at most 1",
    lambda value: (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
    ),
)


def _default(rope: Mapping[str, Any], _: int) -> None:
    return None


def _linear(rope: Mapping[str, Any], _: int) -> LinearRopeScaling | None:
    factor = float(ROPE_FACTOR.read(rope, "factor"))
    return None if factor == 1 else LinearRopeScaling(factor)


def _dynamic(rope: Mapping[str, Any], _: int) -> DynamicRopeScaling:
    return DynamicRopeScaling(float(ROPE_FACTOR.read(rope, "factor")))


def _llama3(rope: Mapping[str, Any], _: int) -> Llama3RopeScaling:
    values = {name: field.read(rope, name) for name, field in _LLAMA3.items()}
    original = values.pop(_ORIGINAL)
    return Llama3RopeScaling(*map(float, values.values()), original)


def _yarn(rope: Mapping[str, Any], max_position_embeddings: int) -> YarnRopeScaling:
    original = SIZE.read(rope, _ORIGINAL)
    names = ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    values = {name: ROPE_FACTOR.optional().read(rope, name) for name in names}
    factor = values["factor"] or max_position_embeddings / original
    attention = values["attention_factor"]
    if attention is None and values["mscale"] and values["mscale_all_dim"]:
        attention = _sharpening(factor, values["mscale"])
        attention /= _sharpening(factor, values["mscale_all_dim"])
    elif attention is None:
        attention = _sharpening(factor, 1.0)
    truncate = FLAG.optional(True, null=False).read(rope, "truncate")
    fast, slow = values["beta_fast"] or 32.0, values["beta_slow"] or 1.0
    return YarnRopeScaling(
        float(factor), original, float(attention), float(fast), float(slow), truncate
    )


def _sharpening(factor: float, mscale: float) -> float:
    """YaRN's factor of cosines and sines."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
