"""A random two-block model with a byte-level tokenizer, and a text to calibrate on."""

from pathlib import Path

import numpy as np
import pytest

from gptvq_jax.config import default_config
from gptvq_jax.models.byte_tokenizer import byte_tokenizer
from gptvq_jax.study.random_model import write_random_llama

NUM_BLOCKS = 3
CONFIG = """
from gptvq_jax.config import default_config
def get_config():
    config = default_config()
    config.model = {model!r}
    config.vq.codebook_update, config.vq.polish_rounds = "none", 0
    config.calibration.datasets, config.evaluation.dataset = {texts!r}[:1], {texts!r}[1]
    config.calibration.num_windows, config.calibration.seqlen = 6, 32
    config.calibration.held_out = 2
    config.evaluation.num_windows, config.evaluation.seqlen = 4, 32
    {more}
    return config
"""


def config_file(path: Path, model_dir: Path, text_files: list[str], *more: str) -> Path:
    """A quick run as a config file, with more lines on `config`."""
    lines = "\n    ".join(more)
    path.write_text(CONFIG.format(model=str(model_dir), texts=text_files, more=lines))
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_random_llama(path, byte_tokenizer(), NUM_BLOCKS, hidden=48, head_dim=16)
    return path


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """Random words from one vocabulary, a file to calibrate on and another to evaluate on."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("etaoinshrdlu"), 5)) for _ in range(300)]
    paths = []
    for name in ("train.txt", "test.txt"):
        path = tmp_path_factory.mktemp("text") / name
        path.write_text(" ".join(generator.choice(words, 2000)))
        paths.append(str(path))
    return paths


@pytest.fixture
def tiny_config(model_dir, text_files):
    """See `quick_config`."""
    return quick_config(model_dir, text_files)


def quick_config(model_dir: Path, text_files: list[str]):
    """Cheap settings: 2D with 2-bit codes, one EM step, windows of 32 tokens."""
    config = default_config()
    config.model = str(model_dir)
    config.vq.bits, config.vq.group_size, config.vq.em_iterations = 1.0, 2048, 1
    config.vq.codebook_update, config.vq.polish_rounds = "none", 0
    config.calibration.datasets, config.evaluation.dataset = text_files[:1], text_files[1]
    config.calibration.num_windows, config.calibration.seqlen = 6, 32
    config.calibration.held_out = 2
    config.calibration.batch_size, config.calibration.asymmetry = 2, 0.0
    config.evaluation.num_windows, config.evaluation.seqlen = 4, 32
    return config
