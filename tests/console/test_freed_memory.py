"""Freed memory goes back, or stays: seen in what the process holds."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os, resource, sys
from gptvq_jax.console import freed_memory
assert freed_memory.return_freed_memory()
if sys.argv[1] == "keep":
    assert freed_memory.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 16 << 20
def use():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")),
    reason="of glibc",
)
def test_what_is_kept_costs_no_page_faults_again():
    faults = {}
    for name in ("return", "keep"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[name] = int(done.stdout)
    assert faults["return"] >= 8 * 8  # of pages of 2 MiB, where they are so large
    assert faults["keep"] < 8
