"""Lengths that texts are padded to."""

from gptvq_jax.serve.lengths import padded_length


def test_few_lengths_none_below_the_text_nor_half_more():
    lengths = range(1, 2049)
    padded = [padded_length(length) for length in lengths]
    assert padded == sorted(padded)
    assert all(p >= n for n, p in zip(lengths, padded, strict=True))
    assert all(p < 1.5 * n for n, p in zip(lengths, padded, strict=True) if n > 16)
    assert sorted(set(padded)) == [
        *(16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
    ]
    assert all(padded_length(size) == size for size in padded)
