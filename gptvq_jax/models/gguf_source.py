"""Models stored in llama.cpp's GGUF format, dequantized to float32 tensor by tensor.

The gguf library has the names of each architecture's tensors. Norms whose scales a family stores
without their 1 are written with it, and the halves of heads interleaved where `GGUFForm` says so.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerFast

from gptvq_jax.console.errors import first_line, printable
from gptvq_jax.models.companions import GENERATION_CONFIG, generation_config
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.gguf_metadata import FREQUENCIES, read_metadata
from gptvq_jax.models.gguf_tokenizer import build_tokenizer
from gptvq_jax.models.source import CheckpointSource, check_names, sampled_digest, tensor_names

_NO_TOKEN = 2**32 - 1


class GGUFSource(CheckpointSource):
    """A ModelSource over one .gguf file.

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
        self._names = gguf_names(self.config)
        check_names(self._path, {*self._tensors} - {FREQUENCIES}, self._names.values())
        if fingerprint is None:
            offsets = [tensor.data_offset for tensor in self._reader.tensors]
            fingerprint = sampled_digest([(self._path, self._reader.data_offset, offsets)])
        self.fingerprint = fingerprint

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
        tensor = self._tensors[self._names[name]]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise NotImplementedError(
                f"{self._path}: tensor {printable(tensor.name)} is stored as "
                f"{tensor.tensor_type.name}, which the gguf library cannot dequantize"
            ) from None
        family, module = self.config.family, name.split(".")[-2]
        if family.norm_offset and module.endswith("norm"):
            array = array - np.float32(family.norm_offset)
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(module)
        if family.gguf.interleaved and heads is not None and array.shape[0] % (2 * heads) == 0:
            array = _unpermute(array, heads)
        return array, self._path


class _Reader(gguf.GGUFReader):
    """Notices the end of the file, after which the library goes on with empty arrays.

    It also reads an array of numbers at once, and one of strings without a view of each length:
    a vocabulary of 262,144 tokens has three such arrays.
    """

    def _get_field_parts(self, offset, raw_type):
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(offset, raw_type)
        head = self._get(offset, np.uint32), self._get(offset + 4, np.uint64)
        kind, count = gguf.GGUFValueType(head[0][0]), int(head[1][0])
        start = offset + 12
        if dtype := self.gguf_scalar_to_np.get(kind):
            values = self._get(start, dtype, count)
            return 12 + values.nbytes, [*head, values], [2], [gguf.GGUFValueType.ARRAY, kind]
        if kind != gguf.GGUFValueType.STRING:
            return super()._get_field_parts(offset, raw_type)
        native = self.byte_order == "I"
        order = sys.byteorder if native else {"little": "big", "big": "little"}[sys.byteorder]
        data, strings = np.asarray(self.data), []
        for _ in range(count):
            stop = start + 8 + int.from_bytes(data[start : start + 8].tobytes(), order)
            if stop > len(data):
                raise ValueError(f"it ends before byte {stop}")
            strings.append(data[start + 8 : stop])
            start = stop
        places = list(range(2, 2 + count))
        return start - offset, [*head, *strings], places, [gguf.GGUFValueType.ARRAY, kind]

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


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """{Hugging Face's name as stored: GGUF's} of all tensors of a model.

    Raises:
      NotImplementedError: llama.cpp has no such tensor in this architecture.
    """
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = config.family.gguf.architecture
    if architecture not in architectures:
        raise NotImplementedError(
            f"the installed gguf library does not know the architecture {architecture!r}; "
            "run: pip install --upgrade gguf"
        )
    table = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)
    names = {name: table.get_name(name, (".weight", ".bias")) for name in tensor_names(config)}
    if unknown := sorted(name for name, stored in names.items() if stored is None):
        raise NotImplementedError(f"architecture {architecture!r} has no tensor for {unknown[0]}")
    return names


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of q and k, (heads * head_dim, ...) -> same.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + half):
    its converter interleaves the halves.
    """
    halves = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order, (heads * head_dim, ...) -> same."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
