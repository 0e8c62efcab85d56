"""Shapes of published models: what their config.json say, by the names that configs/ uses.

From the models' own repositories on the Hugging Face hub, as far as shapes and what a block
computes depend on it. tests/models/test_published.py compares the weights that follow from a row
with the number that its authors give.
"""

from typing import Any

from gptvq_jax.console.nearest_name import nearest_name

# hidden, intermediate, blocks, query heads, key heads, vocabulary, positions
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _row(model_type: str, *sizes: int, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **dict(zip(_SIZES, sizes, strict=True)), **fields}


_LLAMA2 = {"rms_norm_eps": 1e-5, "rope_theta": 1e4}
_OLMO = {"rms_norm_eps": 1e-6, "rope_theta": 5e5}
_GEMMA3 = {"head_dim": 256, "rms_norm_eps": 1e-6, "sliding_window": 512, "rope_theta": 1e6}
_QWEN3 = {"head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama2_7b": _row("llama", 4096, 11008, 32, 32, 32, 32000, 4096, **_LLAMA2),
    "llama2_13b": _row("llama", 5120, 13824, 40, 40, 40, 32000, 4096, **_LLAMA2),
    "llama2_70b": _row("llama", 8192, 28672, 80, 64, 8, 32000, 4096, **_LLAMA2),
    "llama3_8b": _row(
        "llama", 4096, 14336, 32, 32, 8, 128256, 8192, rms_norm_eps=1e-5, rope_theta=5e5
    ),
    "llama3_70b": _row(
        "llama", 8192, 28672, 80, 64, 8, 128256, 8192, rms_norm_eps=1e-5, rope_theta=5e5
    ),
    "smollm2_135m": _row(
        "llama",
        *(576, 1536, 30, 9, 3, 49152, 8192),
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
    ),
    "mistral_7b": _row(
        "mistral",
        *(4096, 14336, 32, 32, 8, 32000, 32768),
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=4096,
    ),
    "mixtral_8x7b": _row(
        "mixtral",
        *(4096, 14336, 32, 32, 8, 32000, 32768),
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    ),
    "qwen25_7b": _row(
        "qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, rms_norm_eps=1e-6, rope_theta=1e6
    ),
    "qwen3_8b": _row("qwen3", 4096, 12288, 36, 32, 8, 151936, 32768, **_QWEN3),
    "qwen3_30b_a3b": _row(
        "qwen3_moe",
        *(2048, 6144, 48, 32, 4, 151936, 32768),
        **_QWEN3,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "smollm3_3b": _row(
        "smollm3",
        *(2048, 11008, 36, 16, 4, 128256, 65536),
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        tie_word_embeddings=True,
    ),
    "granite3_8b": _row(
        "granite",
        *(4096, 12800, 40, 32, 8, 49152, 4096),
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        attention_multiplier=0.0078125,
        residual_multiplier=0.22,
        logits_scaling=16.0,
    ),
    "olmo2_7b": _row("olmo2", 4096, 11008, 32, 32, 32, 100352, 4096, **_OLMO),
    "olmo3_7b": _row(
        "olmo3",
        *(4096, 11008, 32, 32, 32, 100278, 65536),
        **_OLMO,
        sliding_window=4096,
        rope_scaling=_YARN,
    ),
    "phi4": _row(
        "phi3", 5120, 17920, 40, 40, 10, 100352, 16384, rms_norm_eps=1e-5, rope_theta=2.5e5
    ),
    "gemma2_9b": _row(
        "gemma2",
        *(3584, 14336, 42, 16, 8, 256000, 8192),
        head_dim=256,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        sliding_window=4096,
    ),
    "gemma3_1b": _row("gemma3_text", 1152, 6912, 26, 4, 1, 262144, 32768, **_GEMMA3),
    "gemma3_270m": _row("gemma3_text", 640, 2048, 18, 4, 1, 262144, 32768, **_GEMMA3),
    "seed_oss_36b": _row(
        "seed_oss",
        *(5120, 27648, 64, 80, 8, 155136, 524288),
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e7,
        attention_bias=True,
    ),
}

# Weights as their authors, or the hub's page of the model, give them, in units of 10^9.
BILLIONS = {
    "llama2_7b": 6.74,
    "llama2_13b": 13.02,
    "llama2_70b": 68.98,
    "llama3_8b": 8.03,
    "llama3_70b": 70.55,
    "smollm2_135m": 0.1345,
    "mistral_7b": 7.24,
    "mixtral_8x7b": 46.70,
    "qwen25_7b": 7.62,
    "qwen3_8b": 8.19,
    "qwen3_30b_a3b": 30.53,
    "smollm3_3b": 3.08,
    "granite3_8b": 8.17,
    "olmo2_7b": 7.30,
    "olmo3_7b": 7.30,
    "phi4": 14.66,
    "gemma2_9b": 9.24,
    "gemma3_1b": 1.00,
    "gemma3_270m": 0.268,
    "seed_oss_36b": 36.15,
}


def published(name: str) -> dict[str, Any]:
    """The fields of config.json of a model of the table.

    Raises:
      ValueError: there is no such row; names the nearest.
    """
    if name not in PUBLISHED:
        near = nearest_name(name, PUBLISHED)
        meant = f" (the nearest is {near!r})" if near else ""
        raise ValueError(
            f"{name!r} is none of the published models{meant}; those are {', '.join(PUBLISHED)}; "
            "of another one pass the path of its config.json"
        )
    return dict(PUBLISHED[name])
