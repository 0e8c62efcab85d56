"""packing: identity, sizes, a byte worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.core.packing import pack, packed_length, unpack


@pytest.mark.parametrize("bits", range(1, 17))
def test_unpack_inverts_pack_and_bytes_are_fewest(bits):
    rng = np.random.default_rng(bits)
    rows = [rng.integers(0, 2**bits, (3, count)) for count in (13, bits % 8 + 1)]
    rows[0][0] = 2**bits - 1

    @jax.jit
    def round_trip(codes):
        packed = [pack(c, bits) for c in codes]
        return packed, [unpack(p, bits, c.shape[1]) for p, c in zip(packed, codes, strict=True)]

    for codes, packed, unpacked in zip(rows, *round_trip(rows), strict=True):
        count = codes.shape[1]
        assert packed.dtype == jnp.uint8 and unpacked.dtype == jnp.int32
        assert packed.shape == (3, int(np.ceil(count * bits / 8)))
        assert packed.shape[1] == packed_length(count, bits)
        np.testing.assert_array_equal(unpacked, codes)
        # Byte i holds bits 8i..8i+7 of the integer sum_n code_n 2^(bits n).
        for row, row_bytes in zip(codes, packed, strict=True):
            number = sum(int(code) << (bits * n) for n, code in enumerate(row))
            assert bytes(np.asarray(row_bytes)) == number.to_bytes(len(row_bytes), "little")


def test_example_by_hand():
    # 5 = 101, 2 = 010, 7 = 111 -> stream from bit 0: 1,0,1, 0,1,0, 1,1 | 1 -> 0b11010101, 0b1
    np.testing.assert_array_equal(pack(jnp.array([5, 2, 7]), 3), [0b11010101, 0b1])


def test_rows_start_at_byte_boundaries_and_spare_bits_are_zero():
    packed = pack(jnp.full((4, 3), 7), 3)
    np.testing.assert_array_equal(packed, np.tile([0xFF, 0x01], (4, 1)))


def test_accepts_narrow_dtypes():
    np.testing.assert_array_equal(pack(jnp.array([200, 1], jnp.uint8), 8), [200, 1])


@pytest.mark.parametrize("length", [2, 4])
def test_wrong_length_is_an_error_that_names_the_right_one(length):
    with pytest.raises(ValueError, match=f"{length} bytes cannot hold 5 codes of 4 bits.*take 3"):
        unpack(jnp.zeros((2, length), jnp.uint8), 4, 5)


@pytest.mark.parametrize("bits", [0, 17])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be between 1 and 16"):
        pack(jnp.zeros(3, jnp.int32), bits)
    with pytest.raises(ValueError, match=f"bits={bits} must be between 1 and 16"):
        unpack(jnp.zeros(3, jnp.uint8), bits, 3)
