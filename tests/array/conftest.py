"""Makes the references importable in every import mode of pytest, and compilation fast."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]


@pytest.fixture(autouse=True, scope="module")
def compile_fast(fast_compilation):
    """All arrays here are tiny."""
