"""Fixed-width bit packing: n codes of b bits in ceil(n b / 8) bytes, least significant first."""

import math

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
    # Codes fall on the same bits again after `period`, a few bytes: shifts cut them out.
    period = math.lcm(bits, 8)
    chunk_bytes, chunk_codes = period // 8, period // bits
    chunks = -(-packed.shape[-1] // chunk_bytes)
    pad = chunks * chunk_bytes - packed.shape[-1]
    packed = jnp.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, pad)]).astype(jnp.int32)
    packed = packed.reshape(*packed.shape[:-1], chunks, chunk_bytes)
    codes = jnp.stack([_cut(packed, i * bits, bits) for i in range(chunk_codes)], axis=-1)
    return codes.reshape(*codes.shape[:-2], chunks * chunk_codes)[..., :count]


def in_fewest_bytes(codes: jax.Array, bits: int) -> jax.Array:
    """Codes of `bits` bits, 1 to 16, as uint8 or uint16."""
    return codes.astype(jnp.uint8 if bits <= 8 else jnp.uint16)


def _cut(chunk: jax.Array, start: int, bits: int) -> jax.Array:
    """The code at bit `start` of every chunk (..., bytes) int32."""
    first, last = start // 8, (start + bits - 1) // 8
    word = sum(chunk[..., byte] << 8 * (byte - first) for byte in range(first, last + 1))
    return (word >> start % 8) & (2**bits - 1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits=} must be between 1 and {MAX_BITS}")
