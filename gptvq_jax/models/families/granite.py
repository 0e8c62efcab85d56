"""Granite: Llama with a multiplier wherever one can be, and logits that are divided."""

from gptvq_jax.models.families.base import Family, GGUFForm
from gptvq_jax.models.fields import number

_FIELDS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_divisor",
}
_GGUF = ("embedding_scale", "attention.scale", "residual_scale", "logit_scale")
_MULTIPLIER = number(1e-9, 1e9).optional(1.0, null=False)


def _read(hf, fields):
    return {ours: float(_MULTIPLIER.read(hf, theirs)) for theirs, ours in _FIELDS.items()}


def _write(config):
    return {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    models="Granite 3 (dense)",
    biases=("attention_bias", "mlp_bias"),
    read=_read,
    write=_write,
    gguf=GGUFForm("granite", interleaved=True, keys=dict(zip(_FIELDS, _GGUF, strict=True))),
)
