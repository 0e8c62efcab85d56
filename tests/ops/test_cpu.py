"""The C++ kernels, in the instruction set of this machine."""

import shutil

import pytest
from base import CASES, MatmulTests

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)
pytestmark = needs_compiler
_NOT_INT8 = ("4d 3 bit", "float16", "block", "svd", "uniform", "int8 rows", "aqlm")


class TestExact(MatmulTests):
    implementation = "cpu"


class TestInt8(MatmulTests):
    implementation = "cpu_int8"
    supported = tuple(case for case in CASES if not case.startswith(_NOT_INT8))
    float32_error = 1e-2  # of rounding x
