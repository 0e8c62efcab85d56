"""Qwen3: Llama with norms of each head's queries and keys; see also qwen2.py."""

from gptvq_jax.models.families.base import Family, GGUFForm, late_windows, write_late_windows

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    models="Qwen3 (dense)",
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    biases=("attention_bias",),
    qk_norm="head",
    read=late_windows,
    write=write_late_windows,
    handles=("sliding_window", "layer_types"),
    gguf=GGUFForm("qwen3"),
)
