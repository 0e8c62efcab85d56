"""SmolLM3: Llama, of which every fourth block does not turn queries and keys."""

from gptvq_jax.console.errors import brief
from gptvq_jax.models.families.base import (
    BlockKind,
    Family,
    GGUFForm,
    by_block,
    sliding_layers,
    write_late_windows,
)
from gptvq_jax.models.fields import FLAG, SIZE


def _read(hf, fields):
    depth = fields["num_hidden_layers"]
    turns = hf.get("no_rope_layers")  # 1 where a block does turn them, in spite of its name
    if turns is None:
        interval = SIZE.optional(4, null=False).read(hf, "no_rope_layer_interval")
        turns = [int((index + 1) % interval != 0) for index in range(depth)]
    of_known = isinstance(turns, list) and all(type(turn) in (bool, int) for turn in turns)
    if not of_known or len(turns) < depth:
        raise ValueError(f"no_rope_layers must be a list of {depth} 0 or 1, got {brief(turns)}")
    slides = FLAG.optional(False).read(hf, "use_sliding_window")
    window = fields["sliding_window"] if slides else None
    sliding = sliding_layers(hf, depth, lambda index: not turns[index])
    rope = fields["rope_theta"], fields["rope_scaling"]
    kinds = zip(sliding, turns, strict=False)
    return by_block([BlockKind(window if s else None, *rope, bool(turn)) for s, turn in kinds])


def _write(config):
    turns = [int(kind.rotary) for kind in config.kinds]
    return {"no_rope_layers": turns, **write_late_windows(config)}


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    models="SmolLM3",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    biases=("attention_bias", "mlp_bias"),
    read=_read,
    write=_write,
    handles=("sliding_window", "layer_types"),
    gguf=GGUFForm("smollm3", interleaved=True),  # every fourth block without rotation
)
