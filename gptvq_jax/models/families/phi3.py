"""Phi-3 and 4: Llama whose q, k, v are stored as one weight, and gate and up as another."""

from gptvq_jax.models.families.base import Family, GGUFForm
from gptvq_jax.models.fields import SIZE


def _write(config):
    if config.rotary_dim is None:
        return {"partial_rotary_factor": 1.0}
    share = config.rotary_dim / config.head_dim
    if int(config.head_dim * share) < config.rotary_dim:  # as it is read again
        share = (config.rotary_dim + 0.5) / config.head_dim
    return {"partial_rotary_factor": share}


def _read_gguf(metadata, fields):
    dim = metadata("rope.dimension_count", SIZE.optional()) or fields["head_dim"]
    # As `_write`: the share is cut to whole values when it is read.
    return {"partial_rotary_factor": min(1.0, (dim + 0.25) / fields["head_dim"])}


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    models="Phi-3 (4k), Phi-4",
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "eos_token_id": 32000},
    # Its own "longrope" is not implemented; transformers takes "yarn" for that.
    rope_types=("default",),
    fused={
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    },
    write=_write,
    handles=("sliding_window", "partial_rotary_factor"),
    gguf=GGUFForm("phi3", window=True, read=_read_gguf),
)
