"""Writes a model as a GGUF file, llama.cpp's format: float16 or float32, without a tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from flax import traverse_util

from gptvq_jax.exchange.hf_layout import module_name
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.gguf_source import gguf_names, interleave
from gptvq_jax.models.shapes import fused
from gptvq_jax.models.source import ModelSource
from gptvq_jax.storage.tree_io import cast_dense

DTYPES = ("float16", "float32")


def write_gguf(source: ModelSource, path: Path, dtype: str = "float16") -> None:
    """Writes a model, one block in memory at a time; norms and biases are float32.

    There is no tokenizer in the file, so that llama.cpp reads token ids and no text.

    Args:
      source: of the weights; of a packed checkpoint, those that its codes stand for.
      path: of the new file.
      dtype: of weights: float16 or float32.

    Raises:
      NotImplementedError: a family, or a variant of it, that is not written.
      ValueError: a weight overflows `dtype`.
    """
    config = _as_written(source.config)
    writer = gguf.GGUFWriter(path, config.family.gguf.architecture, use_temp_file=True)
    try:
        _metadata(writer, config)
        names = gguf_names(config)
        for index in range(config.num_hidden_layers):
            of_block = _tensors(config, source.block(index), f"layers_{index}/", dtype)
            for name, array in fused(config, of_block):
                writer.add_tensor(names[name], array)
        for name, array in _tensors(config, source.outer(), "", dtype):
            writer.add_tensor(names[name], array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _as_written(config: ModelConfig) -> ModelConfig:
    """The config under the name that llama.cpp has for its architecture."""
    windows = any(kind.sliding_window for kind in config.kinds)
    if config.model_type == "mistral" and not windows:
        config = dataclasses.replace(config, model_type="llama")
    form = config.family.gguf
    stretched = any(kind.rope_scaling for kind in config.kinds)
    if form is None or form.window or windows or stretched:
        what = "stretched rotary embeddings" if stretched else f"model_type {config.model_type!r}"
        window = " with a sliding window" if windows and not stretched else ""
        raise NotImplementedError(f"GGUF files of {what}{window} are not written")
    return config


def _metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    hf, form = config.to_hf(), config.family.gguf
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.kinds[0].rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, key in form.keys.items():
        writer.add_float32(f"{form.architecture}.{key}", float(hf[name]))


def _tensors(config: ModelConfig, params: Any, prefix: str, dtype: str):
    """(Hugging Face's name, array (out, in)) with what llama.cpp stores otherwise."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        path = prefix + path
        kind = "bias" if path.endswith("/bias") else "weight"
        name = f"{module_name(path)}.{kind}"
        array = np.asarray(leaf, np.float32)
        if path.endswith("/kernel"):
            array = array.T
        module = name.split(".")[-2]
        if config.family.norm_offset and module.endswith("norm"):
            array = array + np.float32(config.family.norm_offset)
        if config.family.gguf.interleaved and module in heads:
            array = interleave(array, heads[module])
        yield (
            name,
            np.ascontiguousarray(cast_dense(array, dtype if array.ndim > 1 else "float32", name)),
        )
