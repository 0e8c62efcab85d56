"""Architecture of a Llama-family decoder, read from and written to Hugging Face's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptvq_jax.console.errors import brief
from gptvq_jax.models.fields import (
    EPSILON,
    FLAG,
    OBJECT,
    ROPE_BASE,
    ROPE_FACTOR,
    SIGNED_ID,
    SIGNED_IDS,
    SIZE,
    TEXT,
    integer,
    is_number,
    token_ids,
)

_MAX_LAYERS = 10_000  # ten times the deepest; names of all tensors are made before one is read
_FIELDS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": integer(1, _MAX_LAYERS, f"a positive integer, at most {_MAX_LAYERS}"),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE.optional(),
    "head_dim": SIZE.optional(),
    "rms_norm_eps": EPSILON.optional(1e-6, null=False),
    "max_position_embeddings": SIZE.optional(2048, null=False),
    "sliding_window": SIZE.optional(),
    "tie_word_embeddings": FLAG.optional(False),
    "bos_token_id": SIGNED_ID.optional(1),
    "eos_token_id": SIGNED_IDS.optional(2),
}
# What a config.json leaves unsaid means the default of transformers' LlamaConfig / MistralConfig.
_DEFAULTS = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
# Values of which the decoder knows only these; transformers reads the fields of either family.
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "is_causal": (True, None),
    "partial_rotary_factor": (1, None),
    "layer_types": (None,),
    "per_layer_config": (None,),
    "quantization_config": (None,),
}
_SCALING_FIELDS = {
    "factor": ROPE_FACTOR,
    "low_freq_factor": ROPE_FACTOR,
    "high_freq_factor": ROPE_FACTOR,
    "original_max_position_embeddings": SIZE,
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretch of the rotary wavelengths beyond the pretraining context.

    Wavelengths (in positions) longer than `original_max_position_embeddings / low_freq_factor` are
    multiplied by `factor`, those shorter than `original_max_position_embeddings /
    high_freq_factor` are kept, and the ones between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        for name, field in _SCALING_FIELDS.items():
            field.check(f"rope_scaling.{name}", getattr(self, name))
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope_scaling.low_freq_factor must be < high_freq_factor, got {self}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder; hashable, so usable as a static argument of jit.

    Field names are Hugging Face's. `rope_scaling` is None for plain rotary embeddings.
    `sliding_window` counts the positions a token sees, itself included (None: all earlier ones).
    `eos_token_id` is a tuple where a model has several.

    Raises:
      ValueError: a field is out of range or two fields contradict each other.
      NotImplementedError: `model_type` is not one this decoder implements.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self):
        _check_model_type(self.model_type)
        for name, field in _FIELDS.items():
            field.check(name, getattr(self, name))
        ROPE_BASE.check("rope_theta", self.rope_theta)
        for name in ("num_key_value_heads", "head_dim"):  # null in a file only
            SIZE.check(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.sliding_window is not None and self.model_type == "llama":
            raise ValueError("sliding_window must be null for model_type 'llama', which has none")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads the dict of a config.json, in the form of transformers 4 or of transformers 5.

        Version 4 writes `rope_theta` and `rope_scaling` at top level, version 5 one
        `rope_parameters`. Missing fields take the default of transformers' own config class.

        Raises:
          ValueError: a required field is missing or a value is out of range.
          NotImplementedError: the model needs something this decoder does not compute; the
            message names the field.
        """
        OBJECT.check("the config", hf)
        model_type = hf.get("model_type")
        _check_model_type(model_type)
        _check_supported(hf)
        hf = {**_DEFAULTS[model_type], **hf}
        values = {name: field.read(hf, name) for name, field in _FIELDS.items()}
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        if values["head_dim"] is None:
            if hidden % heads:
                raise ValueError(
                    f"hidden_size={hidden} must be divisible by num_attention_heads={heads} "
                    "when head_dim is absent"
                )
            values["head_dim"] = hidden // heads
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = heads
        eos = values["eos_token_id"]
        values["eos_token_id"] = token_ids(eos) if isinstance(eos, list) else _token(eos)
        values["bos_token_id"] = _token(values["bos_token_id"])
        rope_theta, rope_scaling = _read_rope(hf, values["max_position_embeddings"])
        return cls(
            **{
                **values,
                "model_type": model_type,
                "rms_norm_eps": float(values["rms_norm_eps"]),
                "rope_theta": rope_theta,
                "rope_scaling": rope_scaling,
                "tie_word_embeddings": bool(values["tie_word_embeddings"]),
            }
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the config.json dict that transformers' AutoModelForCausalLM loads.

        It is in the form of transformers 4, which version 5 reads too, holds only JSON types, and
        is the inverse of `from_hf`.
        """
        hf = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            hf["rope_scaling"] = {"rope_type": "llama3", **hf["rope_scaling"]}
        if isinstance(self.eos_token_id, tuple):
            hf["eos_token_id"] = list(self.eos_token_id)
        if self.model_type == "llama":
            del hf["sliding_window"]
            hf |= {"attention_bias": False, "mlp_bias": False}
        return hf | {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "hidden_act": "silu",
            "torch_dtype": "float32",
        }


def _token(value: int | None) -> int | None:
    return next(iter(token_ids(value)), None)


def _check_model_type(model_type: Any) -> None:
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise NotImplementedError(
            f"model_type={brief(model_type)} is not supported; supported: {sorted(_ARCHITECTURES)}"
        )


def _check_supported(hf: Mapping[str, Any]) -> None:
    """Raises NotImplementedError where following `hf` would need code that does not exist."""
    quantization = hf.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == "aqlm":
        raise NotImplementedError(
            "quantization_config of quant_method 'aqlm': not a float model; make a checkpoint of "
            "it with gptvq_jax import"
        )
    for name, values in _ONLY.items():
        if name in hf and hf[name] not in values:
            raise NotImplementedError(
                f"{name}={brief(hf[name])} is not supported, only {values[0]!r}"
            )


def _read_rope(
    hf: Mapping[str, Any], max_position_embeddings: int
) -> tuple[float, Llama3RopeScaling | None]:
    """Returns (theta, scaling) as transformers 5 reads them.

    A `rope_scaling` that is not empty takes the place of `rope_parameters` as a whole. What neither
    says of theta the top level says.
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
    # Early version 4 files call it "type".
    rope_type = TEXT.check(f"{field}.rope_type", rope.get("rope_type", rope.get("type", "default")))
    if rope.get("partial_rotary_factor") not in (1, None):
        raise NotImplementedError(f"{field}.partial_rotary_factor is not supported, only 1")
    factor = rope.get("factor")
    if rope_type == "default" or (rope_type == "linear" and is_number(factor) and factor == 1):
        return theta, None
    if rope_type != "llama3":
        raise NotImplementedError(
            f"{field}.rope_type={brief(rope_type)} is not supported, only 'default' and 'llama3'"
        )
    name = "original_max_position_embeddings"
    if hf.get(name) is not None:  # said at top level it counts more, as in transformers
        rope = {**rope, name: hf[name]}
    rope = {name: max_position_embeddings, **rope}
    try:
        values = {name: field.read(rope, name) for name, field in _SCALING_FIELDS.items()}
    except ValueError as error:
        raise ValueError(f"{field} of rope_type 'llama3': {error}") from None
    return theta, Llama3RopeScaling(
        float(values["factor"]),
        float(values["low_freq_factor"]),
        float(values["high_freq_factor"]),
        values["original_max_position_embeddings"],
    )
