"""Gemma 2: norms of 1 + scale on both sides, soft caps, GeGLU, a window in every second block."""

from gptvq_jax.models.families.base import (
    BlockKind,
    Family,
    GGUFForm,
    Norms,
    by_block,
    read_gemma,
    read_gemma_gguf,
    sliding_layers,
    window_of_some,
    write_gemma,
    write_windows,
)

NORMS = Norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _read(hf, fields):
    sliding = sliding_layers(hf, fields["num_hidden_layers"], lambda index: index % 2 == 0)
    window, rope = window_of_some(fields, sliding), (fields["rope_theta"], fields["rope_scaling"])
    kinds = [BlockKind(window if slides else None, *rope) for slides in sliding]
    return {**read_gemma(hf, fields), **by_block(kinds)}


def _write(config):
    return {**write_gemma(config), **write_windows(config)}


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    models="Gemma 2",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    biases=("attention_bias",),
    activation="hidden_activation",
    norms=NORMS,
    norm_offset=1.0,
    read=_read,
    write=_write,
    handles=("sliding_window", "layer_types"),
    gguf=GGUFForm("gemma2", window=True, read=read_gemma_gguf),
)
