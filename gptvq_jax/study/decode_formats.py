"""The formats of packed weights whose products are measured, by name."""

from collections.abc import Sequence

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.paper import GROUP_SIZES
from gptvq_jax.study.sample_tensors import TensorFormat, TrellisFormat, random_tensor

VQ_FORMATS = {
    f"{dim}d_{bits.removesuffix('b')}": TensorFormat(dim, round(dim * index_bits), group_size)
    for (dim, bits), (index_bits, group_size) in GROUP_SIZES.items()
}
AQLM_FORMATS = {
    "aqlm_2x8": TensorFormat(8, 8, codebook_bits=16, num_codebooks=2, row_scales=True),
    "aqlm_1x16": TensorFormat(8, 16, codebook_bits=16, row_scales=True),
}
TRELLIS_FORMATS = {
    "trellis_2.0_l8": TrellisFormat(2, window_bits=8),
    "trellis_2.0": TrellisFormat(2),
    "trellis_3.0": TrellisFormat(3),
}
FORMATS = VQ_FORMATS | AQLM_FORMATS | TRELLIS_FORMATS


def check_formats(names: Sequence[str]) -> None:
    """Raises ValueError for a name that FORMATS does not have."""
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; choose from {', '.join(FORMATS)}")


def random_quantized(name: str, rows: int, cols: int, seed: int = 0) -> QuantizedTensor:
    """A tensor of host arrays in a format of FORMATS, with random contents."""
    fmt = FORMATS[name]
    if isinstance(fmt, TrellisFormat):
        return fmt.random(rows, cols, seed)
    return random_tensor(fmt, fmt.grid(rows, cols), seed)
