"""Models that the aqlm package quantized, in Hugging Face's layout, read in packed form."""

from typing import Any

import numpy as np

from gptvq_jax.console.errors import brief
from gptvq_jax.core.packing import MAX_BITS
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.exchange.aqlm_format import AQLMFormat, from_aqlm
from gptvq_jax.models.fields import SIZE
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.models.hf_source import DirectorySource
from gptvq_jax.models.source import block_tree, check_shape, in_out, tensor_names
from gptvq_jax.storage.dequantize import dequantize_block

_PARTS = ("codes", "codebooks", "scales")
_SAFETENSORS_INTS = {np.dtype(np.int8): "I8", np.dtype(np.int16): "I16"}
# What a quantization_config leaves unsaid means the default of transformers' AqlmConfig.
_FIELDS = {
    "num_codebooks": SIZE.optional(1, null=False),
    "nbits_per_codebook": SIZE.optional(16, null=False),
    "in_group_size": SIZE.optional(8, null=False),
    "out_group_size": SIZE.optional(1, null=False),
}


class AQLMSource(DirectorySource):
    """A ModelSource over a directory whose config.json says quant_method 'aqlm'.

    A layer that has a dense weight in place of codes is left dense, whatever
    linear_weights_not_to_quantize says.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is truncated, a tensor is missing, or the model is not quantized.
      NotImplementedError: the decoder lacks this architecture, or there is no packed form.
    """

    def __init__(self, directory: HFDirectory):
        self._directory = directory
        self.name = directory.name
        self.format = _read_format(directory)
        self.config = directory.model_config(ignored=("quantization_config",))
        if self.config.family.fused:
            raise NotImplementedError(
                f"{directory.config_path}: codes of model_type {self.config.model_type!r} are not "
                "supported: its layers are stored fused; quantize the float model instead"
            )
        if self.config.family.experts is not None:
            raise NotImplementedError(
                f"{directory.config_path}: codes of model_type {self.config.model_type!r} are not "
                "supported: it has experts; quantize the float model instead"
            )
        self.fingerprint = directory.fingerprint
        expected = set()
        for name in tensor_names(self.config):
            expected.update(self._parts(name) if self.is_quantized(name) else [name])
        directory.check_tensors(self.config, expected)

    def packed_block(self, index: int) -> dict[str, Any]:
        """Block `index` with a VQTensor of the (out, in) weight as each quantized kernel.

        Raises:
          ValueError: there is no such block, or a tensor is not what the config says; the message
            names file and tensor.
          NotImplementedError: a tensor has a dtype of another format.
        """
        leaves = {}
        for name, shape in self._block_tensors(index).items():
            if self.is_quantized(name):
                leaves[name] = self._read_packed(name, shape)
            else:
                leaves[name] = in_out(self._read_host(name, shape))
        return block_tree(leaves)

    def block(self, index: int) -> dict[str, Any]:
        """See ModelSource.block."""
        return dequantize_block(self.packed_block(index))

    def _read_packed(self, name: str, shape: tuple[int, ...]) -> VQTensor:
        codes_name, codebooks_name, scales_name = self._parts(name)
        try:
            shapes = self.format.shapes(*shape)
        except ValueError as error:
            raise ValueError(f"{self._directory.config_path}: {name}: {error}") from None
        dtype = _SAFETENSORS_INTS[self.format.code_dtype]
        codes, path = self._directory.read(codes_name, (dtype,))
        check_shape(codes.shape, shapes["codes"], codes_name, path)
        codebooks = self._read_float16(codebooks_name, shapes["codebooks"])
        scales = self._read_float16(scales_name, shapes["scales"])
        try:
            return from_aqlm(self.format, codes[:], codebooks, scales)
        except ValueError as error:
            raise ValueError(f"{path}: tensor {codes_name}: {error}") from None

    def _read_float16(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = self._read_host(name, shape)
        peak = np.abs(values).max()
        if peak > np.finfo(np.float16).max:
            raise ValueError(
                f"{self._directory.files[name]}: tensor {name} holds {peak:.3g}, too large for "
                "float16, in which codebooks and their scales are stored"
            )
        return values.astype(np.float16)

    def is_quantized(self, name: str) -> bool:
        """Whether the module whose weight is called `name` has at least one part of a layer."""
        return any(part in self._directory.files for part in self._parts(name))

    @staticmethod
    def _parts(name: str) -> list[str]:
        return [f"{name.removesuffix('weight')}{part}" for part in _PARTS]


def _read_format(directory: HFDirectory) -> AQLMFormat:
    path, quantization = directory.config_path, directory.hf_config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise ValueError(
            f"{path} has no quantization_config: the model is not quantized; use gptvq_jax quantize"
        )
    method = quantization.get("quant_method")
    if method != "aqlm":
        raise NotImplementedError(
            f"{path}: quant_method={brief(method)} is not supported, only 'aqlm'"
        )
    try:
        fields = {name: field.read(quantization, name) for name, field in _FIELDS.items()}
    except ValueError as error:
        raise ValueError(f"{path}: quantization_config.{error}") from None
    if fields["out_group_size"] != 1:
        raise NotImplementedError(
            f"{path}: out_group_size={fields['out_group_size']} is not supported, only 1: a vector "
            "of the packed format belongs to one output"
        )
    bits = fields["nbits_per_codebook"]
    if bits > MAX_BITS:
        raise NotImplementedError(
            f"{path}: nbits_per_codebook={bits} is not supported, only up to {MAX_BITS}"
        )
    return AQLMFormat(fields["num_codebooks"], bits, fields["in_group_size"])
