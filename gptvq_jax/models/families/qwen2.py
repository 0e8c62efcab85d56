"""Qwen2 and 2.5: Llama with biases of q, k and v; blocks from an index on may have a window."""

from gptvq_jax.models.families.base import Family, GGUFForm, late_windows, write_late_windows


def _read(hf, fields):
    return {"attention_bias": True, **late_windows(hf, fields)}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    models="Qwen2, Qwen2.5",
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    output_bias=False,
    read=_read,
    write=write_late_windows,
    handles=("sliding_window", "layer_types"),
    gguf=GGUFForm("qwen2"),
)
