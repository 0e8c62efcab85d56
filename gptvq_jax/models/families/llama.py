"""Llama 1 to 3.x and everything that was trained in its form, such as SmolLM2."""

from gptvq_jax.models.families.base import Family, GGUFForm

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    models="Llama 1 to 3.3, SmolLM2",
    biases=("attention_bias", "mlp_bias"),
    gguf=GGUFForm("llama", interleaved=True),
)
