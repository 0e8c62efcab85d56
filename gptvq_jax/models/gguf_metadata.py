"""The metadata of a GGUF file as a ModelConfig.

llama.cpp writes what is common to all families under the same keys, below the name of the
architecture; what a family has beside is in `Family.gguf`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptvq_jax.console.errors import brief
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.families import FAMILIES
from gptvq_jax.models.families.base import Family
from gptvq_jax.models.fields import (
    EPSILON,
    REQUIRED,
    ROPE_BASE,
    ROPE_FACTOR,
    SIZE,
    TOKEN_ID,
    Field,
    integer,
    number,
)
from gptvq_jax.models.rope import inverse_frequencies

Read = Callable[[str], Any]
_OR_ZERO = integer(0, text="a positive integer, or 0 for the usual one")
_BASE_OR_ZERO = dataclasses.replace(
    ROPE_BASE, accepts=lambda value: ROPE_BASE.accepts(value) or brief(value) in ("0", "0.0")
)
# Names of a config.json -> keys below the architecture and what they may hold.
_ARCHITECTURE = {
    "hidden_size": ("embedding_length", SIZE),
    "intermediate_size": ("feed_forward_length", SIZE),
    "num_hidden_layers": ("block_count", SIZE),
    "num_attention_heads": ("attention.head_count", SIZE),
    "num_key_value_heads": ("attention.head_count_kv", _OR_ZERO.optional()),
    "head_dim": ("attention.key_length", _OR_ZERO.optional()),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", EPSILON),
    "rope_theta": ("rope.freq_base", _BASE_OR_ZERO.optional()),
    "max_position_embeddings": ("context_length", SIZE),
}
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}
_ANYTHING = Field("anything", lambda _: True, None)  # what reads it checks it
_STOP_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
FREQUENCIES = "rope_freqs.weight"  # what the wavelengths of Llama 3.1 and later are multiplied by
_YARN_DEFAULTS = {"ext_factor": 1, "attn_factor": 1, "log_multiplier": 0}
_WAY_OUT = "use the model's safetensors checkpoint instead"


def read_metadata(field: Read, tensors: Mapping[str, Any]) -> tuple[ModelConfig, tuple[int, ...]]:
    """The architecture, and the ids that end a turn or a message.

    Args:
      field: returns the value of a metadata key, or None if the file does not have it.
      tensors: by name, as gguf describes them; only rope_freqs.weight is looked into.

    Raises:
      ValueError: a field is missing or holds what it cannot hold; the message names its key.
      NotImplementedError: another architecture, or a variant that the decoder lacks.
    """
    family = _family(field)
    architecture = family.gguf.architecture

    def metadata(key: str, kind: Field) -> Any:
        key = f"{architecture}.{key}"
        value = _shortest(field(key))
        if value is not None:
            return kind.check(key, value)
        if kind.default is REQUIRED:
            raise ValueError(f"lacks the metadata field {key}")
        return kind.default

    def only(key: str, *allowed: Any) -> None:
        if field(key) not in (None, *allowed):
            raise NotImplementedError(f"{key} = {brief(field(key))} is not supported")

    hf = {name: metadata(*key_and_kind) for name, key_and_kind in _ARCHITECTURE.items()}
    tokens = TOKEN_ID.optional()
    hf |= {name: tokens.check(key, field(key)) for name, key in _TOKENS.items()}
    ends = [tokens.check(key, field(key)) for key in _STOP_KEYS]
    hf["num_key_value_heads"] = hf["num_key_value_heads"] or hf["num_attention_heads"]
    hf["head_dim"] = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
    hf["rope_theta"] = hf["rope_theta"] or 10000.0
    if "partial_rotary_factor" not in family.handles:
        only(f"{architecture}.rope.dimension_count", hf["head_dim"])
    only(f"{architecture}.attention.value_length", hf["head_dim"])
    only(f"{architecture}.attention.causal", True)
    only(f"{architecture}.expert_count", 0)
    only("split.count", 0, 1)
    hf["sliding_window"] = None
    if family.gguf.window:
        hf["sliding_window"] = metadata("attention.sliding_window", _OR_ZERO.optional()) or None
    else:
        only(f"{architecture}.attention.sliding_window", 0)
    hf |= {name: _has_bias(tensors, name) for name in family.biases}
    hf["rope_scaling"] = _stretch(metadata, architecture, hf, tensors)
    own = {name: metadata(key, _ANYTHING) for name, key in family.gguf.keys.items()}
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("lacks the tensor token_embd.weight, of two axes")
    hf |= {
        "model_type": family.model_type,
        # Not the field vocab_size, which older files lack; ggml lists the inner axis first.
        "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        **{name: value for name, value in own.items() if value is not None},
        **family.gguf.read(metadata, hf),
    }
    return ModelConfig.from_hf(hf), tuple(token for token in ends if token is not None)


def _family(field: Read) -> Family:
    """The family of an architecture; where it has two, a file with a window is of that with one."""
    families = {
        (family.gguf.architecture, family.gguf.window): family
        for family in FAMILIES.values()
        if family.gguf
    }
    architecture = field("general.architecture")
    window = bool(field(f"{architecture}.attention.sliding_window"))
    for key in ((architecture, window), (architecture, not window)):
        if isinstance(architecture, str) and key in families:
            return families[key]
    raise NotImplementedError(
        f"general.architecture = {brief(architecture)} is not supported, only "
        f"{', '.join(sorted({name for name, _ in families}))}"
    )


def _shortest(value: Any) -> Any:
    """The shortest decimal of the same float32, which is what a file's numbers are: 1e-06."""
    in_range = isinstance(value, float) and abs(value) < np.finfo(np.float32).max
    return float(str(np.float32(value))) if in_range else value


def _has_bias(tensors: Mapping[str, Any], name: str) -> bool:
    return f"blk.0.{'attn_q' if name == 'attention_bias' else 'ffn_up'}.bias" in tensors


def _stretch(metadata, architecture: str, hf: Mapping[str, Any], tensors) -> dict | None:
    """The rope_scaling of a config.json.

    Raises:
      NotImplementedError: llama.cpp would stretch the rotary embeddings as the decoder cannot.
    """
    zero_or_factor = number(0, 1e9).optional()
    kind = metadata("rope.scaling.type", _ANYTHING)
    factors = {
        key: metadata(f"rope.{key}", zero_or_factor)
        for key in ("scaling.factor", "scale_linear", "scaling.attn_factor")
    }
    if kind not in (None, "none", "linear", "yarn"):
        raise NotImplementedError(
            f"{architecture}.rope.scaling.type = {brief(kind)} is not supported; {_WAY_OUT}"
        )
    if factors["scaling.attn_factor"] not in (None, 0, 1):
        raise NotImplementedError(
            f"{architecture}.rope.scaling.attn_factor = {brief(factors['scaling.attn_factor'])} "
            f"is not supported; {_WAY_OUT}"
        )
    # Without a type linear is meant; 0 stands for none.
    factor = factors["scaling.factor"] or factors["scale_linear"] or 1
    stretched = kind != "none" and factor != 1
    if FREQUENCIES in tensors:
        if stretched:
            raise NotImplementedError(
                f"it stretches its rotary embeddings twice ({FREQUENCIES}); {_WAY_OUT}"
            )
        return _llama3(hf, tensors[FREQUENCIES])
    if not stretched:
        return None
    if kind != "yarn":
        return {"rope_type": "linear", "factor": factor}
    for key, usual in _YARN_DEFAULTS.items():
        value = metadata(f"rope.scaling.yarn_{key}", _ANYTHING)
        if value not in (None, usual):
            raise NotImplementedError(
                f"{architecture}.rope.scaling.yarn_{key} = {brief(value)} is not supported; "
                f"{_WAY_OUT}"
            )
    optional = ROPE_FACTOR.optional()
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata(
            "rope.scaling.original_context_length", SIZE.optional()
        )
        or hf["max_position_embeddings"],
        "beta_fast": metadata("rope.scaling.yarn_beta_fast", optional),
        "beta_slow": metadata("rope.scaling.yarn_beta_slow", optional),
    }


def _llama3(hf: Mapping[str, Any], tensor: Any) -> dict | None:
    """The parameters of Llama 3.1 and later which give the stored factors of wavelengths.

    Only `factor` differs between those models, and it is the largest of what is stored.
    """
    stored = np.asarray(tensor.data, np.float64).ravel()
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored.max(initial=1)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if np.array_equal(stored, np.ones_like(stored)):
        return None
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta")
    shape = {name: hf[name] for name in names}
    shape |= {"model_type": "llama", "vocab_size": 1, "intermediate_size": 1}
    shape |= {"num_hidden_layers": 1}
    plain, stretched = (
        inverse_frequencies(ModelConfig.from_hf({**shape, "rope_scaling": one})).astype(np.float64)
        for one in (None, scaling if 1 <= scaling["factor"] <= 1e6 else None)
    )
    if stored.shape != plain.shape or not np.allclose(plain / stretched, stored, rtol=1e-3):
        raise NotImplementedError(
            f"it stretches its rotary embeddings ({FREQUENCIES}) otherwise than Llama 3.1; "
            f"{_WAY_OUT}"
        )
    return scaling
