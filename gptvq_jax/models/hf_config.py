"""Fields of Hugging Face's config.json, read and written: what all families share.

The part of one family is in families/.
"""

import json
from collections.abc import Mapping
from typing import Any

from gptvq_jax.console.errors import brief
from gptvq_jax.models.families import find_family
from gptvq_jax.models.families.base import Family
from gptvq_jax.models.fields import (
    EPSILON,
    FLAG,
    OBJECT,
    SIGNED_ID,
    SIGNED_IDS,
    SIZE,
    integer,
    token_ids,
)
from gptvq_jax.models.rope_scaling import read_rope, write_rope

_MAX_LAYERS = 10_000  # ten times the deepest; names of all tensors are made before one is read
COMMON = {
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
    "pad_token_id": SIGNED_ID.optional(),
}
# Of each name, what the feed-forward layer computes with (models/llama.py).
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
# Values of which the decoder knows only these, unless a family handles the field.
_ONLY = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "is_causal": (True, None),
    "partial_rotary_factor": (1, None),
    "layer_types": (None,),
    "per_layer_config": (None,),
    "use_bidirectional_attention": (False, None),
}


def read_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig; errors are those of ModelConfig.from_hf."""
    OBJECT.check("the config", hf)
    family = find_family(hf.get("model_type"))
    _check_supported(hf, family)
    hf = {**family.defaults, **hf}
    values = {name: field.read(hf, name) for name, field in COMMON.items()}
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
    for name in ("bos_token_id", "pad_token_id"):
        values[name] = _token(values[name])
    values["rms_norm_eps"] = float(values["rms_norm_eps"])
    values["tie_word_embeddings"] = bool(values["tie_word_embeddings"])
    values["hidden_act"] = _activation(hf, family)
    for name in family.biases:
        values[name] = bool(FLAG.optional(False).read(hf, name))
    rope, values["rope_theta"], values["rope_scaling"] = _rope(hf, family, values)
    values |= rope
    return {"model_type": family.model_type, **values, **family.read(hf, values)}


def write_fields(config: Any) -> dict[str, Any]:
    """The dict of a config.json; see ModelConfig.to_hf."""
    family = config.family
    hf = {name: getattr(config, name) for name in ("model_type", *COMMON)}
    if "sliding_window" not in family.handles:
        del hf["sliding_window"]
    if isinstance(config.eos_token_id, tuple):
        hf["eos_token_id"] = list(config.eos_token_id)
    hf |= {name: getattr(config, name) for name in family.biases}
    kind = config.kinds[0]  # where these differ the family says so
    hf |= {"rope_theta": kind.rope_theta, "rope_scaling": write_rope(kind.rope_scaling)}
    return {
        **hf,
        family.activation: config.hidden_act,
        "architectures": [family.architecture],
        "torch_dtype": "float32",
        **family.write(config),
    }


def _rope(hf: Mapping[str, Any], family: Family, values: Mapping[str, Any]):
    """Fields beside theta and scaling, theta, scaling."""
    flat = hf
    if "rope_parameters" in family.handles:  # which has those of each kind of block
        flat = {name: value for name, value in hf.items() if name != "rope_parameters"}
    theta, scaling, share = read_rope(flat, values["max_position_embeddings"], family.rope_types)
    if share == 1:
        return {}, theta, scaling
    if "partial_rotary_factor" not in family.handles:
        raise NotImplementedError(f"partial_rotary_factor={share} is not supported, only 1")
    return {"rotary_dim": int(values["head_dim"] * share)}, theta, scaling


def _activation(hf: Mapping[str, Any], family: Family) -> str:
    name = hf.get(family.activation, "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise NotImplementedError(
            f"{family.activation}={brief(name)} is not supported, only {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _token(value: int | None) -> int | None:
    return next(iter(token_ids(value)), None)


def _check_supported(hf: Mapping[str, Any], family: Family) -> None:
    """Raises NotImplementedError where following `hf` would need code that does not exist."""
    quantization = hf.get("quantization_config")
    if quantization is not None:
        fields = quantization if isinstance(quantization, Mapping) else {}
        method = fields.get("quant_method")
        way_out = "pass the float model that it was made from"
        if method == "aqlm":
            way_out = "make a checkpoint of it with gptvq_jax import"
        said = brief(quantization) if method is None else f"of quant_method {brief(method)}"
        raise NotImplementedError(f"quantization_config {said}: not a float model; {way_out}")
    for name, values in _ONLY.items():
        if name in family.biases or name in family.handles:
            continue
        if name in hf and hf[name] not in values:
            only = json.dumps(values[0])
            raise NotImplementedError(
                f"{name}={brief(hf[name])} is not supported for model_type "
                f"{family.model_type!r}, whose models have {only} there or no such field"
            )
