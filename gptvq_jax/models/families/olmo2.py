"""OLMo 2: Llama with norms behind attention and feed-forward layer, and of all queries and keys."""

from gptvq_jax.models.families.base import Family, GGUFForm, Norms

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    models="OLMo 2",
    defaults={"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279},
    biases=("attention_bias",),
    norms=Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    qk_norm="whole",
    gguf=GGUFForm("olmo2"),
)
