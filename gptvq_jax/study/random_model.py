"""Random Llama-style models in Hugging Face's format: a shape without a mind, for benchmarks."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file


def write_random_llama(
    directory: Path,
    tokenizer,
    num_blocks: int,
    hidden: int,
    head_dim: int = 64,
    seed: int = 0,
    wide: int | None = None,
    vocab_size: int | None = None,
) -> None:
    """Writes config.json, model.safetensors (bfloat16) and the tokenizer files.

    Args:
      directory: is made.
      tokenizer: a transformers tokenizer, or None where no text is read.
      num_blocks: depth.
      hidden: width, a multiple of head_dim.
      head_dim: of an attention head.
      seed: of the weights.
      wide: width of the feed-forward layers, by default 8/3 of `hidden`.
      vocab_size: by default the tokenizer's.
    """
    if hidden % head_dim:
        raise ValueError(f"{hidden=} must be a multiple of {head_dim=}")
    directory.mkdir(parents=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    heads, wide = hidden // head_dim, wide or hidden * 8 // 3
    vocab = vocab_size or len(tokenizer)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))

    generator = np.random.default_rng(seed)

    def dense(rows: int, cols: int) -> np.ndarray:
        weight = generator.standard_normal((rows, cols), dtype=np.float32) / np.sqrt(cols)
        return weight.astype(ml_dtypes.bfloat16)

    ones = np.ones(hidden, ml_dtypes.bfloat16)
    tensors = {"model.embed_tokens.weight": dense(vocab, hidden), "model.norm.weight": ones}
    for index in range(num_blocks):
        block = f"model.layers.{index}."
        for name in "qkvo":
            tensors[f"{block}self_attn.{name}_proj.weight"] = dense(hidden, hidden)
        tensors[f"{block}mlp.gate_proj.weight"] = dense(wide, hidden)
        tensors[f"{block}mlp.up_proj.weight"] = dense(wide, hidden)
        tensors[f"{block}mlp.down_proj.weight"] = dense(hidden, wide)
        tensors[f"{block}input_layernorm.weight"] = ones
        tensors[f"{block}post_attention_layernorm.weight"] = ones
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
