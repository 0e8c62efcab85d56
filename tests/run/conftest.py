"""Fixtures of runs on a tiny model."""

import pytest
from tiny_run import model_dir, text_files, tiny_config  # noqa: F401 - fixtures


@pytest.fixture(autouse=True, scope="module")
def compile_fast(short_programs):
    """What is quantized here is tiny."""
