"""Names and shapes of the tensors of a model, as checkpoints in Hugging Face's layout have them."""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from gptvq_jax.models.config import ModelConfig

Named = tuple[str, np.ndarray]


def module_path(module: str) -> str:
    """mlp.up_proj -> mlp/up_proj, mlp.experts.3.up_proj -> mlp/experts_3/up_proj."""
    return re.sub(r"\bexperts\.(\d+)", r"experts_\1", module).replace(".", "/")


def stored_module(path: str) -> str:
    """The inverse of `module_path`."""
    return re.sub(r"\bexperts_(\d+)", r"experts.\1", path).replace("/", ".")


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns {Hugging Face name: shape as stored} of the tensors outside the blocks."""
    vocab, hidden = config.vocab_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns {name below "model.layers.N.": shape as stored, (out, in)} of one block.

    `config` is that of the block where blocks differ in layers. Weights that the family stores
    fused have a name each here; see `fused_place`.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    family = config.family
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
    }
    if config.experts:
        names, inner = family.experts, config.expert_size
        shapes[f"{names.module}.{names.router}.weight"] = (config.experts, hidden)
        feeds = [f"{names.module}.experts.{i}" for i in range(config.experts)]
    else:
        feeds, names = ["mlp"], None
    gate, up, down = names.layers if names else ("gate_proj", "up_proj", "down_proj")
    for feed in feeds:
        shapes[f"{feed}.{gate}.weight"] = shapes[f"{feed}.{up}.weight"] = (inner, hidden)
        shapes[f"{feed}.{down}.weight"] = (hidden, inner)
    with_bias = ["q_proj", "k_proj", "v_proj"] if config.attention_bias else []
    with_bias += ["o_proj"] if config.attention_bias and family.output_bias else []
    with_bias += ["gate_proj", "up_proj", "down_proj"] if config.mlp_bias else []
    biases = {
        name.replace("weight", "bias"): shape[:1]
        for name, shape in shapes.items()
        if name.split(".")[-2] in with_bias
    }
    shapes |= biases
    shapes |= {f"{name}.weight": (hidden,) for name in family.norms if name is not None}
    if family.qk_norm is not None:
        widths = (queries, keys) if family.qk_norm == "whole" else (config.head_dim,) * 2
        shapes |= {f"self_attn.{n}_norm.weight": (w,) for n, w in zip("qk", widths, strict=True)}
    return shapes


def opened_width(config: ModelConfig, stage: int) -> int:
    """Width of what stage 0 or 2 opens, and the next one closes (llama.run_stage)."""
    if stage == 0:
        return config.num_attention_heads * config.head_dim
    return (
        config.experts_per_token * config.expert_size
        if config.experts
        else (config.intermediate_size)
    )


def fused_place(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[str, int, int]:
    """Where a tensor is stored: name of the tensor there, its first row in it, all rows of it.

    Args:
      config: of the model.
      name: full name, as if nothing were fused.
      shape: of the tensor.
    """
    *parent, module, kind = name.split(".")
    for home, parts in config.family.fused.items():
        if module in parts:
            shapes = block_shapes(config)
            rows = [shapes[f"{parent[-1]}.{part}.{kind}"][0] for part in parts]
            start = sum(rows[: parts.index(module)])
            return ".".join([*parent, home, kind]), start, sum(rows)
    return name, 0, shape[0]


def fused(config: ModelConfig, tensors: Iterable[Named]) -> Iterator[Named]:
    """Tensors of a block (name, array (out, in)) as the family stores them."""
    waiting: dict[str, np.ndarray] = {}
    for name, array in tensors:
        home, _, rows = fused_place(config, name, array.shape)
        if home == name:
            yield name, array
            continue
        waiting[name] = array
        module = home.split(".")[-2]
        parts = [home.replace(f".{module}.", f".{part}.") for part in config.family.fused[module]]
        if all(part in waiting for part in parts):
            yield home, np.concatenate([waiting.pop(part) for part in parts])
