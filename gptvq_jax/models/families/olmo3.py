"""OLMo 3: OLMo 2 with a window in three of four blocks, which turn without YaRN."""

from gptvq_jax.models.families.base import (
    BlockKind,
    Family,
    GGUFForm,
    by_block,
    sliding_layers,
    window_of_some,
    write_windows,
)
from gptvq_jax.models.families.olmo2 import FAMILY as OLMO2
from gptvq_jax.models.fields import Field
from gptvq_jax.models.window_ropes import FULL, SLIDING, read_ropes, write_ropes

# One theta is of all blocks, as in transformers 4, where no object for each kind gives it: version
# 5 then takes 500000, which all published models have, for those with a window.
_BASES = {FULL: ("rope_theta", 5e5), SLIDING: ("rope_theta", 5e5)}
_PATTERN = Field(
    "a list of true or false",
    lambda value: isinstance(value, list) and all(isinstance(slides, bool) for slides in value),
).optional()


def _read(hf, fields):
    sliding = sliding_layers(hf, fields["num_hidden_layers"], lambda index: (index + 1) % 4 != 0)
    window = window_of_some(fields, sliding)
    ropes = read_ropes(hf, fields["max_position_embeddings"], _BASES)
    kinds = {True: BlockKind(window, *ropes[SLIDING]), False: BlockKind(None, *ropes[FULL])}
    return by_block([kinds[slides] for slides in sliding])


def _write(config):
    return {**write_windows(config), **write_ropes(config)}


def _read_gguf(metadata, fields):
    pattern = metadata("attention.sliding_window_pattern", _PATTERN)
    if pattern is None:
        return {}
    return {"layer_types": [SLIDING if slides else FULL for slides in pattern]}


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    models="OLMo 3",
    defaults={**OLMO2.defaults, "sliding_window": 4096},
    biases=OLMO2.biases,
    norms=OLMO2.norms,
    qk_norm=OLMO2.qk_norm,
    read=_read,
    write=_write,
    handles=("sliding_window", "layer_types", "rope_parameters"),
    gguf=GGUFForm("olmo2", window=True, read=_read_gguf),
)
