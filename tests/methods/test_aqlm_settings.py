"""Settings of AQLM: bad ones name their field and value."""

import re

import pytest

from gptvq_jax.methods.aqlm import AQLMSettings

BAD = [
    ("num_codebooks", dict(num_codebooks=0)),
    ("num_codebooks", dict(num_codebooks=17, start="residual")),
    ("code_bits", dict(code_bits=0)),
    ("code_bits", dict(code_bits=17, seed="random")),
    ("dim", dict(dim=6)),
    ("dim", dict(dim=32)),
    ("start", dict(start="sweep")),
    ("start", dict(num_codebooks=3)),
    ("start", dict(num_codebooks=8, dim=4)),
    ("seed", dict(seed="cdf")),
    ("seed", dict(code_bits=13)),
    ("em_iterations", dict(em_iterations=-1)),
    ("beam", dict(beam=0)),
    ("beam", dict(beam=9)),
    ("rounds", dict(rounds=-1)),
    ("tolerance", dict(tolerance=-0.1)),
    ("tolerance", dict(tolerance=1.0)),
    ("codebook_update", dict(codebook_update="none")),
    ("update_iterations", dict(update_iterations=0)),
    ("learning_rate", dict(learning_rate=0.0)),
    ("block_size", dict(block_size=0)),
]


@pytest.mark.parametrize("field, kw", BAD)
def test_bad_settings_name_their_field_and_value(field, kw):
    value = getattr(AQLMSettings(), field) if field not in kw else kw[field]
    with pytest.raises(ValueError, match=rf"^aqlm\.{field}={re.escape(repr(value))} must be "):
        AQLMSettings(**kw)


@pytest.mark.parametrize(
    "kw",
    [
        dict(num_codebooks=1, code_bits=16, seed="random"),
        dict(num_codebooks=1, code_bits=12),
        dict(num_codebooks=3, start="residual"),
        dict(num_codebooks=16, dim=16, code_bits=1, beam=8),
        dict(rounds=0, em_iterations=0, tolerance=0.0, seed="mahalanobis"),
    ],
)
def test_good_settings(kw):
    settings = AQLMSettings(**kw)
    assert settings.codebook_size == 2**settings.code_bits
    assert hash(settings) == hash(AQLMSettings(**kw))
    grid = settings.grid(12, 35)
    assert (grid.row_strips, grid.col_strips) == (1, 1)
    assert grid.padded_cols == -(-35 // settings.dim) * settings.dim
