"""A block of the decoder as one C++ call, where a step feeds it one token of each sequence.

XLA runs such a step as dozens of small programs, each of which takes longer to start than to run.
What the call computes is what models/llama.py says; ops/cpu/block.h has it for all families but
those with experts. Blocks that it cannot run are left to XLA.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.kv_cache import LayerCache
from gptvq_jax.models.llama import get_layer
from gptvq_jax.models.rope import inverse_frequencies
from gptvq_jax.models.rope_scaling import YarnRopeScaling
from gptvq_jax.ops.cpu.build import library
from gptvq_jax.ops.cpu.call import Call
from gptvq_jax.ops.vq_matmul import VQKernel

_LAYERS = {  # name in the call: that in the block
    "q": "self_attn/q_proj",
    "k": "self_attn/k_proj",
    "v": "self_attn/v_proj",
    "o": "self_attn/o_proj",
    "gate": "mlp/gate_proj",
    "up": "mlp/up_proj",
    "down": "mlp/down_proj",
}
_NOTHING = np.zeros(0, np.float32)


def runs_natively(
    config: ModelConfig,
    block: Mapping[str, Any],
    x: jax.Array,
    cache: LayerCache,
    positions: jax.Array | None,
) -> bool:
    """Whether `native_step` takes these arguments."""
    if jax.default_backend() != "cpu" or config.experts or positions is None:
        return False
    if x.shape[1] != 1 or {x.dtype, cache.k.dtype} != {jnp.dtype("float32")}:
        return False
    kernels = [get_layer(block, name).get("kernel") for name in _LAYERS.values()]
    return all(isinstance(k, VQKernel) and k.native_call() is not None for k in kernels)


def native_step(
    config: ModelConfig,
    block: Mapping[str, Any],
    x: jax.Array,
    cache: LayerCache,
    positions: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """`llama.block_step` of one token of each sequence.

    Args:
      config: of the block.
      block: its parameters.
      x: (batch, 1, hidden) float32.
      cache: float32; its arrays become those of the new one where they are donated.
      positions: (batch, 1).
    """
    calls, arrays = {}, []
    for name, place in _LAYERS.items():
        layer = get_layer(block, place)
        call = layer["kernel"].native_call()
        row_scales = layer["kernel"].row_scales
        arrays += [_vector(row_scales), _vector(layer.get("bias")), *call.arrays]
        calls[name] = _attributes(call)
    frequencies = inverse_frequencies(config) if config.rotary else _NOTHING
    rows = x.reshape(-1, x.shape[-1])
    results = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (rows, cache.k, cache.v))
    library()
    step = jax.ffi.ffi_call("gptvq_block_step", results, input_output_aliases={0: 0, 3: 1, 4: 2})
    rows, k, v = step(
        rows,
        positions.reshape(-1).astype(jnp.int32),
        frequencies,
        cache.k,
        cache.v,
        *_norms(config, block),
        *arrays,
        **calls,
        sizes=_sizes(config),
    )
    return rows.reshape(x.shape), LayerCache(k, v)


def _norms(config: ModelConfig, block: Mapping[str, Any]) -> list[jax.Array]:
    family = config.family
    scales = [None if name is None else block[name]["scale"] for name in family.norms]
    attention = block["self_attn"] if family.qk_norm else {}
    scales += [attention[name]["scale"] if attention else None for name in ("q_norm", "k_norm")]
    if not family.norm_offset:
        return [_vector(scale) for scale in scales]
    offset = jnp.float32(family.norm_offset)
    return [_NOTHING if s is None else s.astype(jnp.float32) + offset for s in scales]


def _vector(values: jax.Array | None) -> jax.Array:
    """As the call reads it."""
    if values is None:
        return _NOTHING
    return values if values.dtype in (jnp.float16, jnp.float32) else values.astype(jnp.float32)


def _attributes(call: Call) -> dict[str, Any]:
    return {"target": call.target, "arrays": np.int64(len(call.arrays)), **call.attributes}


def _sizes(config: ModelConfig) -> dict[str, Any]:
    scaling, scale = config.rope_scaling, config.attention_scale
    numbers = {
        "eps": config.rms_norm_eps,
        "residual_scale": config.residual_scale,
        "scale": 1 / math.sqrt(config.head_dim) if scale is None else scale,
        "softcap": config.attention_softcap or 0,
        "rotary_factor": (scaling.attention_factor if isinstance(scaling, YarnRopeScaling) else 1),
    }
    counts = {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "inner": config.intermediate_size,
        "window": config.sliding_window or 0,
        "gelu": config.hidden_act == "gelu_pytorch_tanh",
    }
    return {n: np.float32(v) for n, v in numbers.items()} | {
        n: np.int64(v) for n, v in counts.items()
    }
