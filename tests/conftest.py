"""What tests of tiny arrays share."""

import os
from importlib import metadata

# Much of the time of many tests is the compiler's, half of that in its newer way of fusing. Since
# JAX 0.11 there is no other, and no such flag.
if tuple(map(int, metadata.version("jax").split(".")[:2])) < (0, 11):
    flag = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import jax
import pytest

from gptvq_jax.moves import nearest


@pytest.fixture(scope="module")
def fast_compilation():
    """For tests whose time is nearly all compile time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def short_programs():
    """A shorter unrolled loop is the same search (test_nearest_em_seed) and compiles sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_UNROLL", 4)
        yield
