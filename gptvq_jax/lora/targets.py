"""The layers that get an adapter, by the last parts of their names."""

from collections.abc import Sequence

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.models.stages import expert_of

Shapes = dict[str, tuple[int, int]]


def target_shapes(config: ModelConfig, targets: Sequence[str]) -> Shapes:
    """{"layers_3/self_attn/q_proj": (out, in)} of the layers with these names, in order.

    Args:
      config: of the model.
      targets: such as "q_proj"; of a weight that the family stores for several layers, such as
        "qkv_proj", all of them.

    Raises:
      ValueError: there is no such layer; names those that there are.
    """
    parts = [
        part for name in targets for part in config.family.fused.get(name.strip(), [name.strip()])
    ]
    shapes: Shapes = {}
    for index in range(config.num_hidden_layers):
        for name, shape in layer_shapes(config.of_block(index)).items():
            if expert_of(name) is None:
                shapes[f"layers_{index}/{name}"] = shape
    known = list(dict.fromkeys(_end(name) for name in shapes))
    for part in parts:
        if part not in known:
            raise ValueError(
                f"--targets={part} names no linear layer that can have an adapter; choose from "
                f"{', '.join([*known, *config.family.fused])}"
            )
    return {name: shape for name, shape in shapes.items() if _end(name) in parts}


def _end(name: str) -> str:
    return name.rpartition("/")[2]
