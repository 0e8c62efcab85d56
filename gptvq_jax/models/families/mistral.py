"""Mistral: Llama with a sliding window in every block."""

from gptvq_jax.models.families.base import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    models="Mistral 7B, Mistral Nemo",
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    handles=("sliding_window",),
)
