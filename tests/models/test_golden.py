"""The decoder reproduces stored logits of the PyTorch models; needs no PyTorch."""

import json

import jax
import numpy as np
import pytest
from make_golden import GOLDEN_DIR, GOLDEN_POSITIONS, GOLDEN_SEEDS, random_params, random_tokens

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Decoder


@pytest.mark.parametrize("name", sorted(GOLDEN_SEEDS))
def test_golden_logits(name):
    golden = json.loads((GOLDEN_DIR / f"{name}.json").read_text())
    config, seed = ModelConfig.from_hf(golden["config"]), golden["seed"]
    params = random_params(config, seed)
    logits = jax.jit(Decoder(config).apply)({"params": params}, random_tokens(config, seed))
    assert len(golden["logits"]) == len(GOLDEN_POSITIONS)
    for position, expected in golden["logits"].items():
        assert np.std(expected) > 0.5  # a degenerate model would agree with anything
        np.testing.assert_allclose(logits[0, int(position)], expected, rtol=0, atol=1e-3)
