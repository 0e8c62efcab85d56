"""Shapes of published models: the weights that follow from them are those that are published."""

import math
import re
from pathlib import Path

import pytest

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.published import BILLIONS, PUBLISHED, published
from gptvq_jax.models.shapes import block_shapes, outer_shapes

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_as_many_as_published(name):
    config = ModelConfig.from_hf(published(name))
    count = sum(map(math.prod, outer_shapes(config).values()))
    for block, times in config.block_counts().items():
        count += times * sum(map(math.prod, block_shapes(block).values()))
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=0.002)


def test_every_config_file_has_its_model_there():
    stems = {
        re.sub(r"_(1d|2d|4d|aqlm|trellis|mixed|tune)$", "", p.stem) for p in CONFIGS.glob("*.py")
    }
    assert stems <= set(PUBLISHED)


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"nearest is 'llama2_70b'.*config\.json"):
        published("llama2-70b")
