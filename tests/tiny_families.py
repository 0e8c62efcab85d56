"""A small random model of every family, and of every kind of rotary embedding, as files."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.shapes import block_shapes, fused, outer_shapes

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-2,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_YARN_MORE = {"beta_fast": 8, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.4}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
# {name: config.json}, in the forms that checkpoints have. Every field says something that shows in
# the logits: no multiplier is 1, no window and no original context is longer than the text.
CONFIGS = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama linear": {
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama dynamic": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
        "max_position_embeddings": 100,
    },
    "llama yarn": {"model_type": "llama", "rope_scaling": _YARN},
    "llama yarn mscale": {
        "model_type": "llama",
        "rope_parameters": {**_YARN, **_YARN_MORE, "rope_theta": 5e3},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 20},
    "mixtral": {
        "model_type": "mixtral",
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2": {"model_type": "qwen2", **_WINDOWS, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "attention_bias": True, "head_dim": 24},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
        "attention_bias": True,
    },
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "olmo3": {
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "attention_bias": True,
        "sliding_window": 16,
        "rope_theta": 5e5,
        "rope_scaling": _YARN,
    },
    "olmo3 layer types": {
        "model_type": "olmo3",
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_theta": 5e5,
    },
    # Its transformers has no head_dim of its own.
    "phi3": {
        "model_type": "phi3",
        "head_dim": 12,
        "partial_rotary_factor": 0.5,
        "sliding_window": 40,
    },
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 16,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 9,
        "rope_theta": 5e4,
        "rope_local_base_freq": 300.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "seed_oss": {"model_type": "seed_oss"},
}


def hf_config(name: str, **changes) -> dict:
    """The config.json of a name in CONFIGS."""
    return {**_SMALL, **CONFIGS[name], **changes}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """{name as stored: float32 array}, of RandomState, whose stream is frozen in NumPy.

    Kernels are large enough for sharp attention; norm scales and biases far enough from what
    changes nothing.
    """
    rng = np.random.RandomState(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("norm.weight"):
            return 1 - np.float32(config.family.norm_offset) + np.float32(0.3) * values
        if name.endswith("bias"):
            return np.float32(0.3) * values
        if name.endswith("embed_tokens.weight"):
            return values / np.float32(config.embedding_scale)
        return values * np.float32(1.3 / np.sqrt(shape[1]))

    tensors = {name: tensor(name, shape) for name, shape in sorted(outer_shapes(config).items())}
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        of_block = sorted(block_shapes(config.of_block(index)).items())
        shapes = {prefix + name: shape for name, shape in of_block}
        named = [(name, tensor(name, shape)) for name, shape in shapes.items()]
        tensors |= dict(fused(config, named))
    return tensors


def write_model(directory: Path, name: str, dtype=np.float32, shards: int = 1, **changes) -> Path:
    """A directory with config.json and safetensors; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    hf = hf_config(name, **changes)
    (directory / "config.json").write_text(json.dumps(hf))
    tensors = random_tensors(ModelConfig.from_hf(hf))
    tensors = {name: np.ascontiguousarray(array.astype(dtype)) for name, array in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    homes = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {tensor: homes[i % shards] for i, tensor in enumerate(tensors)}
    for home in homes:
        part = {tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == home}
        save_file(part, directory / home, metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def random_tokens(time: int, vocab_size: int = 64, batch: int = 1) -> np.ndarray:
    """int32 (batch, time)."""
    return np.random.RandomState(1).randint(vocab_size, size=(batch, time)).astype(np.int32)


def torch_logits(directory: Path, tokens: np.ndarray, dtype=None) -> np.ndarray:
    """Of transformers' eager model in float32; needs torch."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=dtype or torch.float32
    )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()
