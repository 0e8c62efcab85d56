"""What tests of tiny arrays share."""

import jax
import pytest


@pytest.fixture(scope="module")
def fast_compilation():
    """For tests whose time is nearly all compile time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
