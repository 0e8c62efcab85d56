"""Gemma 3, the text model: Gemma 2 with norms of queries and keys, and a rotary base of its own
for the blocks that have a window."""

from gptvq_jax.models.families.base import (
    BlockKind,
    Family,
    GGUFForm,
    by_block,
    read_gemma,
    read_gemma_gguf,
    sliding_layers,
    window_of_some,
    write_gemma,
    write_windows,
)
from gptvq_jax.models.families.gemma2 import NORMS
from gptvq_jax.models.fields import ROPE_BASE, SIZE
from gptvq_jax.models.window_ropes import FULL, SLIDING, read_ropes, write_ropes

_BASES = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}


def _read(hf, fields):
    pattern = SIZE.optional(6, null=False).read(hf, "sliding_window_pattern")
    depth = fields["num_hidden_layers"]
    sliding = sliding_layers(hf, depth, lambda index: (index + 1) % pattern != 0)
    window = window_of_some(fields, sliding)
    ropes = read_ropes(hf, fields["max_position_embeddings"], _BASES)
    kinds = {True: BlockKind(window, *ropes[SLIDING]), False: BlockKind(None, *ropes[FULL])}
    return {**read_gemma(hf, fields), **by_block([kinds[slides] for slides in sliding])}


def _write(config):
    ropes = write_ropes(config, "rope_local_base_freq")
    return {**write_gemma(config), **write_windows(config), **ropes}


def _read_gguf(metadata, fields):
    base = metadata("rope.freq_base_swa", ROPE_BASE.optional(1e4))
    return {"rope_local_base_freq": base, **read_gemma_gguf(metadata, fields)}


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    models="Gemma 3 (text)",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    biases=("attention_bias",),
    activation="hidden_activation",
    norms=NORMS,
    qk_norm="head",
    norm_offset=1.0,
    read=_read,
    write=_write,
    handles=("sliding_window", "layer_types", "rope_parameters"),
    gguf=GGUFForm("gemma3", window=True, read=_read_gguf),
)
