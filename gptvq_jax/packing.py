"""Fixed-width bit packing: n codes of b bits in ceil(n b / 8) bytes, least significant first."""

import jax
import jax.numpy as jnp

MAX_BITS = 16


def packed_length(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits occupy."""
    return -(-count * bits // 8)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs the last axis of unsigned integers.

    Args:
      codes: integers in [0, 2**bits), shape (..., n).
      bits: width of a code, 1 to 16.

    Returns:
      uint8 (..., ceil(n * bits / 8)); every row starts at a byte boundary, unused bits are 0.
    """
    _check_bits(bits)
    codes = jnp.asarray(codes, jnp.uint32)
    planes = (codes[..., None] >> jnp.arange(bits, dtype=jnp.uint32)) & 1
    stream = planes.astype(jnp.uint8).reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return jnp.packbits(stream, axis=-1, bitorder="little")


def unpack(packed: jax.Array, bits: int, count: int) -> jax.Array:
    """Inverse of `pack`.

    Args:
      packed: uint8 (..., ceil(count * bits / 8)).
      bits: width of a code, 1 to 16.
      count: number of codes in a row.

    Returns:
      int32 (..., count).
    """
    _check_bits(bits)
    if packed.shape[-1] != packed_length(count, bits):
        raise ValueError(
            f"{packed.shape[-1]} bytes cannot hold {count} codes of {bits} bits, "
            f"which take {packed_length(count, bits)}"
        )
    stream = jnp.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    planes = stream.reshape(*packed.shape[:-1], count, bits).astype(jnp.int32)
    return jnp.sum(planes << jnp.arange(bits, dtype=jnp.int32), axis=-1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits=} must be between 1 and {MAX_BITS}")
