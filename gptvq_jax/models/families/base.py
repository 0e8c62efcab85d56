"""What a family of models is: everything that one file of this folder says of it.

All families run the block of models/llama.py with options: those that belong to the family are
fields here, those that a config.json may choose are fields of ModelConfig.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptvq_jax.console.errors import brief
from gptvq_jax.models.fields import FLAG, SIZE, Field, integer, number
from gptvq_jax.models.rope_scaling import ROPE_TYPES, RopeScaling

Fields = dict[str, Any]
MOST_EXPERTS = integer(1, 1024)  # twice as many as the largest; names of all are made first
_DEEP_GEMMAS = (46, 62)  # blocks of the models of 27B, of Gemma 2 and of Gemma 3
_CAPS = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}


class Norms(NamedTuple):
    """Names of a block's norms, as stored; None where there is none."""

    before_attention: str | None
    after_attention: str | None  # of the output, before it is added to x
    before_feed: str | None
    after_feed: str | None


class BlockKind(NamedTuple):
    """In what blocks of one model may differ; names are those of ModelConfig."""

    sliding_window: int | None
    rope_theta: float
    rope_scaling: RopeScaling | None
    rotary: bool = True
    num_experts: int = 0


class ExpertNames(NamedTuple):
    """Names of what a block with experts has in place of "mlp", as stored."""

    module: str  # holds the router, and "experts.0", "experts.1", ...
    layers: tuple[str, str, str]  # of each expert: what gate_proj, up_proj and down_proj are
    router: str = "gate"


class GGUFForm(NamedTuple):
    """How llama.cpp writes a family. Names of tensors are in the gguf library's table of them.

    Attributes:
      architecture: `general.architecture` of its files; two families may have one, the one with a
        window and the other without.
      interleaved: whether rows of q and k are in the order of pairs that turn together.
      window: whether a sliding window is written.
      keys: {field of a config.json: metadata key below the architecture's name} beside the usual.
      read: (metadata, fields of a config.json so far) -> further ones; metadata(key, Field) gives
        the value below the architecture's name, checked, or the Field's default.
    """

    architecture: str
    interleaved: bool = False
    window: bool = False
    keys: Mapping[str, str] = {}  # noqa: RUF012 - a NamedTuple's default
    read: Callable[[Callable[[str, Field], Any], Fields], Fields] = lambda *_: {}


PRE_NORMS = Norms("input_layernorm", None, "post_attention_layernorm", None)


def nothing(*_: Any) -> Fields:
    """No fields."""
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
      model_type, architecture: as config.json names them.
      models: what people call them, for the README.
      defaults: what a config.json leaves unsaid, where it is not what LlamaConfig has.
      biases: which of the fields attention_bias and mlp_bias it has.
      output_bias: whether o_proj has a bias where q, k and v have one.
      activation: name of the field of the feed-forward layer's activation.
      norms: of a block.
      qk_norm: whether queries and keys have a norm: over a "head", over the "whole" width, or None.
      norm_offset: added to the stored scales of all norms.
      rope_types: that transformers has for it.
      experts: of blocks that have some; None: there are no such blocks.
      fused: {module as stored: our modules whose rows it holds, in order}.
      read: (dict of a config.json, fields of ModelConfig so far) -> further ones. It may name
        fields that it `handles`.
      write: ModelConfig -> the fields of a config.json of which `read` makes the same again.
      handles: fields of a config.json that other families refuse.
      gguf: how llama.cpp writes it, if it does.
    """

    model_type: str
    architecture: str
    models: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    output_bias: bool = True
    activation: str = "hidden_act"
    norms: Norms = PRE_NORMS
    qk_norm: str | None = None
    norm_offset: float = 0.0
    rope_types: tuple[str, ...] = ROPE_TYPES
    experts: ExpertNames | None = None
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    read: Callable[[Mapping[str, Any], Fields], Fields] = nothing
    write: Callable[[Any], Fields] = nothing
    handles: tuple[str, ...] = ()
    gguf: GGUFForm | None = None


def sliding_layers(
    hf: Mapping[str, Any], depth: int, default: Callable[[int], bool]
) -> tuple[bool, ...]:
    """Whether each block attends within the sliding window, from `layer_types`.

    Args:
      hf: dict of a config.json.
      depth: number of blocks.
      default: of a block, where the field is absent.

    Raises:
      ValueError: the field is not a list of `depth` names.
      NotImplementedError: it has another name than the two.
    """
    types = hf.get("layer_types")
    if types is None:
        return tuple(default(index) for index in range(depth))
    if not isinstance(types, list) or len(types) != depth:
        raise ValueError(f"layer_types must be a list of {depth} names, got {brief(types)}")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(
                f"layer_types has {brief(name)}, only 'full_attention' and 'sliding_attention' "
                "are supported"
            )
    return tuple(name == "sliding_attention" for name in types)


def experts_of_token(hf: Mapping[str, Any], count: int, default: int) -> int:
    """`num_experts_per_tok` of a config.json, `default` where it is absent.

    Args:
      hf: dict of a config.json.
      count: experts of a block; 0 where no block has any, and the number does not count.
      default: of the family.

    Raises:
      ValueError: it is not from 1 to `count`.
    """
    number = SIZE.optional(default, null=False).read(hf, "num_experts_per_tok")
    return integer(1, count).check("num_experts_per_tok", number) if count else number


def window_of_some(fields: Fields, sliding: Sequence[bool]) -> int | None:
    """The window of blocks of which some are `sliding`.

    Raises:
      ValueError: there is none.
    """
    if any(sliding) and fields["sliding_window"] is None:
        raise ValueError("sliding_window must be a positive integer, got None: some blocks have it")
    return fields["sliding_window"]


def by_block(kinds: Sequence[BlockKind]) -> Fields:
    """The fields of ModelConfig that say it, whether or not all blocks are alike."""
    if len(set(kinds)) == 1:
        return kinds[0]._asdict()
    # What counts for no block has one value only, or equal models would not be equal.
    defaults = BlockKind(None, 10000.0, None)._asdict()
    return {**defaults, "blocks": tuple(kinds)}


def late_windows(hf: Mapping[str, Any], fields: Fields) -> Fields:
    """Qwen's: a window, if `use_sliding_window`, in blocks from `max_window_layers` on."""
    slides = FLAG.optional(False).read(hf, "use_sliding_window")
    window = (4096 if "sliding_window" not in hf else fields["sliding_window"]) if slides else None
    first = integer(0).optional(28, null=False).read(hf, "max_window_layers")
    sliding = sliding_layers(hf, fields["num_hidden_layers"], lambda index: index >= first)
    rope = fields["rope_theta"], fields["rope_scaling"]
    return by_block([BlockKind(window if slides else None, *rope) for slides in sliding])


def read_gemma(hf: Mapping[str, Any], fields: Fields) -> Fields:
    """Gemma's scales and soft caps."""
    cap = number(1e-9, 1e9).optional()
    scalar = SIZE.read(hf, "query_pre_attn_scalar")
    caps = {ours: cap.read(hf, theirs) for ours, theirs in _CAPS.items()}
    return {
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "attention_scale": scalar**-0.5,
        **{ours: None if value is None else float(value) for ours, value in caps.items()},
    }


def write_gemma(config: Any) -> Fields:
    """The inverse of `read_gemma`."""
    caps = {theirs: getattr(config, ours) for ours, theirs in _CAPS.items()}
    return {"query_pre_attn_scalar": round(config.attention_scale**-2), **caps}


def read_gemma_gguf(metadata: Callable[[str, Field], Any], fields: Fields) -> Fields:
    """Gemma's soft caps, and its score scale, which llama.cpp knows from the size of a model."""
    cap, deep = number(0, 1e9).optional(), fields["num_hidden_layers"] in _DEEP_GEMMAS
    per_head = fields["hidden_size"] // fields["num_attention_heads"]
    # A cap of 0 is none.
    caps = {theirs: metadata(theirs, cap) or None for theirs in _CAPS.values()}
    return {"query_pre_attn_scalar": per_head if deep else fields["head_dim"], **caps}


def write_windows(config: Any) -> Fields:
    """The inverse of `sliding_layers`: which blocks have a window, and its size."""
    windows = [kind.sliding_window for kind in config.kinds]
    types = ["sliding_attention" if window else "full_attention" for window in windows]
    window = next((window for window in windows if window), None)
    return {"layer_types": types, "sliding_window": window}


def write_late_windows(config: Any) -> Fields:
    """The inverse of `late_windows`."""
    windows = write_windows(config)
    return {**windows, "use_sliding_window": windows["sliding_window"] is not None}
