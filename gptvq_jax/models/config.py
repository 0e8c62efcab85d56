"""Architecture of a Llama-family decoder, read from and written to Hugging Face's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What a config.json leaves unsaid means the default of transformers' LlamaConfig / MistralConfig.
_DEFAULTS = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
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
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"rope_scaling.{field.name} must be positive, got {self}")
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
        sizes = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta}")
        if self.sliding_window is not None:
            if self.model_type == "llama":
                raise ValueError(
                    "sliding_window must be null for model_type 'llama', which has none"
                )
            if self.sliding_window < 1:
                raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")

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
        model_type = hf.get("model_type")
        _check_model_type(model_type)
        _check_supported(hf)
        for name in _REQUIRED:
            if hf.get(name) is None:
                raise ValueError(f"config.json lacks the field {name!r}")

        hf = {**_DEFAULTS[model_type], **hf}
        heads = hf["num_attention_heads"]
        head_dim = hf.get("head_dim")
        if head_dim is None:
            if hf["hidden_size"] % heads:
                raise ValueError(
                    f"hidden_size={hf['hidden_size']} must be divisible by "
                    f"num_attention_heads={heads} when head_dim is absent"
                )
            head_dim = hf["hidden_size"] // heads
        kv_heads = hf["num_key_value_heads"]
        rope_theta, rope_scaling = _read_rope(hf)
        eos = hf.get("eos_token_id", 2)
        return cls(
            model_type=model_type,
            **{name: hf[name] for name in _REQUIRED},
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=hf["max_position_embeddings"],
            sliding_window=hf.get("sliding_window"),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            bos_token_id=hf.get("bos_token_id", 1),
            eos_token_id=tuple(eos) if isinstance(eos, (list, tuple)) else eos,
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


def _check_model_type(model_type: Any) -> None:
    if model_type not in _ARCHITECTURES:
        raise NotImplementedError(
            f"model_type={model_type!r} is not supported; supported: {sorted(_ARCHITECTURES)}"
        )


def _check_supported(hf: Mapping[str, Any]) -> None:
    """Raises NotImplementedError where following `hf` would need code that does not exist."""
    quantization = hf.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == "aqlm":
        raise NotImplementedError(
            "quantization_config of quant_method 'aqlm': not a float model; make a checkpoint of "
            "it with scripts/import.py"
        )
    allowed = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1, None),
        "layer_types": (None,),
        "quantization_config": (None,),
    }
    for name, values in allowed.items():
        if name in hf and hf[name] not in values:
            raise NotImplementedError(f"{name}={hf[name]!r} is not supported, only {values[0]!r}")


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """Returns (theta, scaling) from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    field = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = dict(hf.get(field) or {})
    theta = rope.pop("rope_theta", hf.get("rope_theta"))
    theta = 10000.0 if theta is None else float(theta)
    # Early version 4 files call it "type".
    legacy_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", legacy_type)
    if rope.pop("partial_rotary_factor", 1) not in (1, None):
        raise NotImplementedError(f"{field}.partial_rotary_factor is not supported, only 1")
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise NotImplementedError(
            f"{field}.rope_type={rope_type!r} is not supported, only 'default' and 'llama3'"
        )
    names = [f.name for f in dataclasses.fields(Llama3RopeScaling)]
    missing = [name for name in names if name not in rope]
    if missing:
        raise ValueError(f"{field} of rope_type 'llama3' lacks {missing}")
    factor, low, high, original = (rope[name] for name in names)
    return theta, Llama3RopeScaling(float(factor), float(low), float(high), int(original))
