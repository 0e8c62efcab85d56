"""What tests of tiny arrays share."""

import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

# What tests share is importable in every import mode of pytest.
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in (".", "ops", "serve")]

# Programs are compiled once for all files of a process and the scripts that its tests start. Each
# worker of pytest-xdist has a directory of its own: JAX writes entries without a lock.
own_cache = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    own_cache = tempfile.mkdtemp(prefix="gptvq_jax_tests_")  # empty, and removed at the end
    os.environ["JAX_COMPILATION_CACHE_DIR"] = own_cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
elif worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{worker}"

# Most of the time of the tests is the compiler's: arrays are tiny. Scripts that tests start compile
# likewise. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 the tests run the programs that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Half of that time is that of its newer way of fusing. Since JAX 0.11 there is no other, and no
# such flag.
if tuple(map(int, metadata.version("jax").split(".")[:2])) < (0, 11):
    flag = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import jax
import pytest

from gptvq_jax.moves import nearest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Workers are for directories: tests and files named one by one start sooner without."""
    named = all("::" in argument or argument.endswith(".py") for argument in config.args)
    return 0 if named else None  # pytest-xdist's own count


def pytest_unconfigure():
    if own_cache:
        shutil.rmtree(own_cache, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Or those of all files stay in memory, several GB by the end."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def short_programs():
    """A shorter unrolled loop is the same search (test_nearest_em_seed) and compiles sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_UNROLL", 4)
        yield
