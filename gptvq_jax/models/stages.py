"""The linear layers of a block: which there are, what they read, and which stage runs them.

A block runs in four stages (llama.DecoderBlock). Layers of a group read one and the same array.
These are the names of Llama; a config says those of its blocks (ModelConfig.layers). The layers of
experts are called MODULE/experts_3/LAYER, and what belongs to all of them, by the slots of tokens
(experts.py), MODULE/experts/LAYER.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

Group = tuple[str, ...]

STAGES = ("mix", "attend", "gate", "feed")  # of DecoderBlock
CLOSING = (1, 3)  # stages whose layers add their outputs to x
EXPERT_STAGES = (2, 3)  # that experts may run
LINEAR_GROUPS: tuple[Group, ...] = (  # of Llama: one a stage
    ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    ("self_attn/o_proj",),
    ("mlp/gate_proj", "mlp/up_proj"),
    ("mlp/down_proj",),
)
LINEAR_LAYERS = tuple(name for group in LINEAR_GROUPS for name in group)


_EXPERT = re.compile(r"/experts_(\d+)/")


def expert_groups(
    module: str, layers: Sequence[str], count: int
) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """The groups of both stages of experts; `layers` are the names of gate, up and down."""
    gate, up, down = layers
    each = [f"{module}/experts_{number}/" for number in range(count)]
    return tuple((e + gate, e + up) for e in each), tuple((e + down,) for e in each)


def expert_of(name: str) -> int | None:
    """Number of the expert that a layer belongs to; None: all tokens meet it."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


class LinearLayers(NamedTuple):
    """Those of one block.

    Attributes:
      stages: by stage, its groups in order of evaluation.
      groups: of all stages.
      names: of all groups.
      stage_of: {name: number of its stage}.
      first_of: {name: first name of its group}.
    """

    stages: tuple[tuple[Group, ...], ...]
    groups: tuple[Group, ...]
    names: tuple[str, ...]
    stage_of: dict[str, int]
    first_of: dict[str, str]


def linear_layers(stages: tuple[tuple[Group, ...], ...]) -> LinearLayers:
    """All of it, from the groups of every stage."""
    groups = tuple(group for of_stage in stages for group in of_stage)
    numbered = enumerate(stages)
    return LinearLayers(
        stages,
        groups,
        tuple(name for group in groups for name in group),
        {name: stage for stage, of in numbered for group in of for name in group},
        {name: group[0] for group in groups for name in group},
    )
