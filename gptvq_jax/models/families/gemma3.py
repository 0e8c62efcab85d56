"""Gemma 3, the text model: Gemma 2 with norms of queries and keys, and a rotary base of its own
for the blocks that have a window."""

from gptvq_jax.models.families.base import (
    BlockKind,
    Family,
    GGUFForm,
    by_block,
    gemma_window,
    read_gemma,
    read_gemma_gguf,
    sliding_layers,
    write_gemma,
    write_windows,
)
from gptvq_jax.models.families.gemma2 import NORMS
from gptvq_jax.models.fields import OBJECT, ROPE_BASE, SIZE
from gptvq_jax.models.rope_scaling import read_rope, write_rope

_BASES = {"full_attention": 1e6, "sliding_attention": 1e4}
_FLAT = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def _ropes(hf, max_positions):
    """(theta, scaling) by the type of a block."""
    given = OBJECT.optional().read(hf, "rope_parameters") or {}
    ropes = {}
    for kind, base in _BASES.items():
        rope = dict(OBJECT.optional().read(given, kind) or {})
        if kind == "full_attention":
            rope |= OBJECT.optional().read(hf, "rope_scaling") or {}
        if rope.get("rope_theta") is None:
            rope["rope_theta"] = ROPE_BASE.optional(base).read(hf, _FLAT[kind]) or base
        *ropes[kind], share = read_rope({"rope_parameters": rope}, max_positions)
        if share != 1:
            raise NotImplementedError("partial_rotary_factor is not supported, only 1")
    return ropes


def _read(hf, fields):
    pattern = SIZE.optional(6, null=False).read(hf, "sliding_window_pattern")
    depth = fields["num_hidden_layers"]
    sliding = sliding_layers(hf, depth, lambda index: (index + 1) % pattern != 0)
    window = gemma_window(fields, sliding)
    ropes = _ropes(hf, fields["max_position_embeddings"])
    kinds = {
        True: BlockKind(window, *ropes["sliding_attention"]),
        False: BlockKind(None, *ropes["full_attention"]),
    }
    return {**read_gemma(hf, fields), **by_block([kinds[slides] for slides in sliding])}


def _write(config):
    of_kind = {kind.sliding_window is not None: kind for kind in config.kinds}
    hf = write_windows(config)
    ropes = {}
    for slides, name in ((True, "sliding_attention"), (False, "full_attention")):
        if slides in of_kind:
            kind = of_kind[slides]
            scaling = write_rope(kind.rope_scaling) or {"rope_type": "default"}
            ropes[name] = {**scaling, "rope_theta": kind.rope_theta}
    if "full_attention" in ropes:
        hf["rope_theta"] = ropes["full_attention"]["rope_theta"]
        scaling = of_kind[False].rope_scaling
        hf["rope_scaling"] = write_rope(scaling)
    if "sliding_attention" in ropes:
        hf["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        if of_kind[True].rope_scaling is not None:
            hf["rope_parameters"] = ropes
    return {**write_gemma(config), **hf}


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
