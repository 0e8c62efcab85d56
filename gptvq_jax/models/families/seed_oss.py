"""Seed-OSS: Llama with biases of q, k and v, not of o."""

from gptvq_jax.models.families.base import Family, GGUFForm
from gptvq_jax.models.fields import FLAG


def _read(hf, fields):
    if FLAG.optional(False).read(hf, "attention_out_bias"):
        raise NotImplementedError("attention_out_bias=True is not supported, only False")
    return {}


def _write(config):
    return {"attention_out_bias": False}


FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    models="Seed-OSS",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "bos_token_id": 0,
        "attention_bias": True,
    },
    biases=("attention_bias", "mlp_bias"),
    output_bias=False,
    read=_read,
    write=_write,
    gguf=GGUFForm("seed_oss"),
)
