"""Qwen3-MoE: Qwen3 with experts in place of the feed-forward layer, in all blocks or in some."""

from gptvq_jax.console.errors import brief
from gptvq_jax.models.families.base import (
    MOST_EXPERTS,
    BlockKind,
    ExpertNames,
    Family,
    by_block,
    experts_of_token,
)
from gptvq_jax.models.fields import FLAG, SIZE, is_integer


def _read(hf, fields):
    depth = fields["num_hidden_layers"]
    name = "num_local_experts" if "num_experts" not in hf else "num_experts"
    count = MOST_EXPERTS.optional(128, null=False).read(hf, name)
    step = SIZE.optional(1, null=False).read(hf, "decoder_sparse_step")
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(map(is_integer, dense)):
        raise ValueError(f"mlp_only_layers must be a list of indices, got {brief(dense)}")
    slides = FLAG.optional(False).read(hf, "use_sliding_window")
    window = (4096 if "sliding_window" not in hf else fields["sliding_window"]) if slides else None
    block = BlockKind(window, fields["rope_theta"], fields["rope_scaling"])
    sparse = [index not in dense and (index + 1) % step == 0 for index in range(depth)]
    return {
        "experts_per_token": experts_of_token(hf, count * any(sparse), default=8),
        "expert_size": SIZE.optional(768, null=False).read(hf, "moe_intermediate_size"),
        "normalize_experts": bool(FLAG.optional(False).read(hf, "norm_topk_prob")),
        **by_block([block._replace(num_experts=count if s else 0) for s in sparse]),
    }


def _write(config):
    counts = [kind.num_experts for kind in config.kinds]
    window = config.kinds[0].sliding_window
    return {
        # Where no block has experts, whatever number.
        "num_experts": max(counts) or config.experts_per_token,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.normalize_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, count in enumerate(counts) if not count],
        "sliding_window": window,
        "use_sliding_window": window is not None,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    models="Qwen3-MoE",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    biases=("attention_bias",),
    qk_norm="head",
    experts=ExpertNames("mlp", ("gate_proj", "up_proj", "down_proj")),
    read=_read,
    write=_write,
    handles=("sliding_window",),
)
