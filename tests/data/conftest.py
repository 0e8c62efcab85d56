"""The packaged Wikipedia text, parsed once for all tests of this directory."""

import importlib.metadata

import pytest

from gptvq_jax.data import documents


@pytest.fixture(scope="session")
def wikipedia():
    """{split: list of articles}."""
    try:
        importlib.metadata.distribution("gensim")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gensim is not installed")
    return {split: list(documents("wikipedia", split)) for split in ("train", "test")}
