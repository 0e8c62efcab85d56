"""Mixtral: Mistral with experts in place of the feed-forward layer, whose weights sum to 1."""

from gptvq_jax.models.families.base import MOST_EXPERTS, ExpertNames, Family, experts_of_token


def _read(hf, fields):
    count = MOST_EXPERTS.optional(8, null=False).read(hf, "num_local_experts")
    return {
        "num_experts": count,
        "experts_per_token": experts_of_token(hf, count, default=2),
        "expert_size": fields["intermediate_size"],
    }


def _write(config):
    return {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    models="Mixtral 8x7B, 8x22B",
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
    },
    experts=ExpertNames("block_sparse_moe", ("w1", "w3", "w2")),
    read=_read,
    write=_write,
    handles=("sliding_window",),
)
