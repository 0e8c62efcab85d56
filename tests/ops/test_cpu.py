"""The C++ kernels, in the instruction set of this machine."""

import shutil

import pytest
from base import CASES, MatmulTests

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)
_REFUSED = ("float16", "block", "svd", "uniform", "int8 rows", "aqlm")
SUPPORTED = tuple(case for case in CASES if not case.startswith(_REFUSED))


class TestExact(MatmulTests):
    implementation = "cpu"
    supported = SUPPORTED


class TestInt8(MatmulTests):
    implementation = "cpu_int8"
    supported = SUPPORTED
    float32_error = 1e-2  # of rounding x
