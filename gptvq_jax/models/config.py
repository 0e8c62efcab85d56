"""Architecture of a decoder, read from and written to Hugging Face's config.json."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from gptvq_jax.models.families import find_family
from gptvq_jax.models.families.base import MOST_EXPERTS, BlockKind, Family
from gptvq_jax.models.fields import ROPE_BASE, SIZE, integer, number
from gptvq_jax.models.hf_config import ACTIVATIONS, COMMON, read_fields, write_fields
from gptvq_jax.models.rope_scaling import (
    DynamicRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
)
from gptvq_jax.models.stages import (
    LINEAR_GROUPS,
    Group,
    LinearLayers,
    expert_groups,
    linear_layers,
)

__all__ = ["Llama3RopeScaling", "ModelConfig"]

_SCALE = number(1e-9, 1e9)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder; hashable, so usable as a static argument of jit.

    What a family fixes is in `family`; these are the choices of one model. Field names are Hugging
    Face's where it has one for all families. `rope_scaling` is None for plain rotary embeddings.
    `sliding_window` counts the positions a token sees, itself included (None: all earlier ones).
    `eos_token_id` is a tuple where a model has several.

    Where blocks differ, `blocks` says how, and the fields of BlockKind here are defaults that count
    for none of them: `of_block` gives the config of one block, which is
    what code that runs a block wants.

    Raises:
      ValueError: a field is out of range or two fields contradict each other.
      NotImplementedError: `model_type` is not one this decoder implements.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None  # only handed on
    hidden_act: str = "silu"
    attention_bias: bool = False  # of q, k and v; of o_proj too if the family has it
    mlp_bias: bool = False
    rotary: bool = True  # whether queries and keys turn
    rotary_dim: int | None = None  # of each head; None: all of it
    embedding_scale: float = 1.0  # factor of the embeddings, not of a tied head
    attention_scale: float | None = None  # factor of q k^T; None: 1 / sqrt(head_dim)
    residual_scale: float = 1.0  # factor of what attention and feed-forward layer add to x
    logit_divisor: float = 1.0
    attention_softcap: float | None = None  # c: scores s become c tanh(s / c)
    logit_softcap: float | None = None
    num_experts: int = 0  # in place of a feed-forward layer that all tokens share
    experts_per_token: int = 0
    expert_size: int = 0  # what intermediate_size is to a feed-forward layer
    normalize_experts: bool = True  # whether the weights of a token's experts sum to 1
    blocks: tuple[BlockKind, ...] | None = None

    def __post_init__(self):
        find_family(self.model_type)
        for name, field in COMMON.items():
            field.check(name, getattr(self, name))
        if self.hidden_act not in ACTIVATIONS.values():
            raise ValueError(f"hidden_act={self.hidden_act!r} is not one of {set(ACTIVATIONS)}")
        for name in ("num_key_value_heads", "head_dim"):  # null in a file only
            SIZE.check(name, getattr(self, name))
        for name in ("embedding_scale", "residual_scale", "logit_divisor"):
            _SCALE.check(name, getattr(self, name))
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            _SCALE.optional().check(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if not 0 < dim <= self.head_dim or dim % 2:
            raise ValueError(f"rotary_dim={dim} must be even, at most head_dim={self.head_dim}")
        if self.blocks is not None and len(self.blocks) != self.num_hidden_layers:
            raise ValueError(
                f"blocks has {len(self.blocks)} entries, num_hidden_layers={self.num_hidden_layers}"
            )
        for kind in set(self.kinds):
            self._check_kind(kind, dim)
            self._check_experts(kind.num_experts)

    def _check_kind(self, kind: BlockKind, dim: int) -> None:
        ROPE_BASE.check("rope_theta", kind.rope_theta)
        if isinstance(kind.rope_scaling, DynamicRopeScaling) and dim == 2:
            raise ValueError("head_dim=2 is too small for rope_scaling of rope_type 'dynamic'")
        if isinstance(kind.rope_scaling, YarnRopeScaling) and kind.rope_theta <= 1:
            raise ValueError("rope_theta=1 is too small for rope_scaling of rope_type 'yarn'")
        if kind.sliding_window is not None and "sliding_window" not in self.family.handles:
            raise ValueError(
                f"sliding_window must be null for model_type {self.model_type!r}, which has none"
            )

    def _check_experts(self, count: int) -> None:
        if not count:
            return
        if self.family.experts is None:
            raise ValueError(f"model_type {self.model_type!r} has no experts: num_experts={count}")
        MOST_EXPERTS.check("num_experts", count)
        integer(1, count).check("experts_per_token", self.experts_per_token)
        SIZE.check("expert_size", self.expert_size)

    @property
    def family(self) -> Family:
        """What the model has by its `model_type`."""
        return find_family(self.model_type)

    @property
    def kinds(self) -> tuple[BlockKind, ...]:
        """Of every block, in what it may differ from others."""
        if self.blocks is not None:
            return self.blocks
        own = BlockKind(*(getattr(self, name) for name in BlockKind._fields))
        return (own,) * self.num_hidden_layers

    def block_counts(self, first: int | None = None) -> Counter["ModelConfig"]:
        """How many of the `first` blocks, or of all, have which config."""
        depth = self.num_hidden_layers
        return Counter(self.of_block(i) for i in range(depth if first is None else first))

    @property
    def experts(self) -> int:
        """Of a block.

        Raises:
          ValueError: this is a model some of whose blocks have other layers than others.
        """
        if self.blocks is None:
            return self.num_experts
        counts = {kind.num_experts for kind in self.blocks}
        if len(counts) > 1:
            raise ValueError("blocks of this model differ in layers: pass config.of_block(index)")
        return counts.pop()

    @property
    def layers(self) -> LinearLayers:
        """The linear layers of a block; raises what `experts` does."""
        return _layers(self.model_type, self.experts)

    @property
    def linear_groups(self) -> tuple[Group, ...]:
        """Names of the linear layers of a block that read the same array, in order."""
        return self.layers.groups

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of all linear layers of a block, in order of evaluation."""
        return self.layers.names

    def of_block(self, index: int) -> "ModelConfig":
        """The config of block `index`, with which it is run; the same for blocks of one kind."""
        return self if self.blocks is None else _of_kind(self, self.blocks[index])

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads the dict of a config.json, in the form of transformers 4 or of transformers 5.

        Version 4 writes `rope_theta` and `rope_scaling` at top level, version 5 one
        `rope_parameters`. Missing fields take the default of transformers' own config class.

        Raises:
          ValueError: a required field is missing or a value is out of range.
          NotImplementedError: the model needs something this decoder does not compute; the
            message names the field.
        """
        return cls(**read_fields(hf))

    def to_hf(self) -> dict[str, Any]:
        """Returns the config.json dict that transformers' AutoModelForCausalLM loads.

        It is in the form of transformers 4, which version 5 reads too, holds only JSON types, and
        is the inverse of `from_hf`.
        """
        return write_fields(self)


@functools.cache
def _layers(model_type: str, experts: int) -> LinearLayers:
    names = find_family(model_type).experts
    stages = tuple((group,) for group in LINEAR_GROUPS)
    if experts:
        stages = stages[:2] + expert_groups(names.module, names.layers, experts)
    return linear_layers(stages)


@functools.cache
def _of_kind(config: ModelConfig, kind: BlockKind) -> ModelConfig:
    return dataclasses.replace(config, blocks=None, **kind._asdict())
