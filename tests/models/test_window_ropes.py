"""Rotary embeddings of blocks with and without a window, as fields of a config.json."""

import pytest
from tiny_families import hf_config

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.rope_scaling import LinearRopeScaling
from gptvq_jax.models.window_ropes import FULL, SLIDING, read_ropes, write_ropes

BASES = {FULL: ("rope_theta", 5e5), SLIDING: ("rope_theta", 5e5)}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "hf, full, sliding",
    [
        ({}, (5e5, None), (5e5, None)),
        ({"rope_theta": 1e4}, (1e4, None), (1e4, None)),
        ({"rope_scaling": LINEAR}, (5e5, LinearRopeScaling(2.0)), (5e5, None)),
        (
            {"rope_theta": 1e4, "rope_parameters": {SLIDING: {**LINEAR, "rope_theta": 3e3}}},
            (1e4, None),
            (3e3, LinearRopeScaling(2.0)),
        ),
    ],
)
def test_a_stretch_is_of_blocks_without_a_window_unless_said_of_both(hf, full, sliding):
    assert read_ropes(hf, 512, BASES) == {FULL: full, SLIDING: sliding}


@pytest.mark.parametrize("types", [[SLIDING] * 3, [FULL] * 3, [SLIDING, FULL, SLIDING]])
@pytest.mark.parametrize("local_base", [None, "rope_local_base_freq"])
@pytest.mark.parametrize("stretched", [True, False])
def test_what_is_written_is_read_again(types, local_base, stretched):
    ropes = {SLIDING: {"rope_type": "default", "rope_theta": 3e3}}
    ropes[FULL] = {**LINEAR, "rope_theta": 7e4}
    if stretched:
        ropes[SLIDING] |= {**LINEAR, "factor": 4.0}
    hf = hf_config("gemma3_text", layer_types=types, rope_scaling=None, rope_parameters=ropes)
    config = ModelConfig.from_hf(hf)
    written = write_ropes(config, local_base)
    if set(types) == {SLIDING}:  # transformers would ask for blocks without a window
        assert written["rope_scaling"] is None
    bases = BASES | ({} if local_base is None else {SLIDING: (local_base, 1e4)})
    flat = {"rope_theta": config.kinds[0].rope_theta}  # which all families write
    found = read_ropes(flat | written, 512, bases)
    for kind in config.kinds:
        name = SLIDING if kind.sliding_window else FULL
        assert found[name] == (kind.rope_theta, kind.rope_scaling)
