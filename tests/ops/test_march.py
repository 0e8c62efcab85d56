"""Kernels compiled for another instruction set than that of this machine, in a process of its own:
a library is loaded once."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from test_cpu import needs_compiler

from gptvq_jax.ops.cpu import build

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64"),
]

_PROGRAM = """
import sys
import jax.numpy as jnp
import numpy as np
sys.path[:0] = [{tests!r}, {root!r}]
from base import decoded, relative_error, tensor_of
from gptvq_jax.ops import vq_matmul
from gptvq_jax.ops.cpu import build
build.choose_march("x86-64-v3")
assert build.instruction_set() == "avx2"
for case in ("2d 2 bit", "2d 3 bit, ragged", "4d 2 bit"):
    for implementation, bound in (("cpu", 1e-5), ("cpu_int8", 1e-2)):
        for batch in (1, 6):
            x = np.random.default_rng(batch).normal(size=(batch, tensor_of(case).shape[1]))
            x = x.astype(np.float32)
            y = vq_matmul.vq_matmul(
                jnp.asarray(x), tensor_of(case), implementation=implementation
            )
            error = relative_error(y, x @ decoded(case).T)
            assert error < bound, (case, implementation, batch, error)
"""


@pytest.mark.slow
def test_products_of_another_instruction_set():
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    here = Path(__file__).parent
    program = _PROGRAM.format(tests=str(here), root=str(here.parent.parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def unused(monkeypatch):
    """As in a process that has not loaded the kernels."""
    monkeypatch.setattr(build, "_chosen_flags", ())
    build._load_once.cache_clear()
    yield
    build._load_once.cache_clear()


def test_an_unknown_name_quotes_the_compiler(unused):
    with pytest.raises(ValueError, match="march='x86-64-v9' is not known: .*x86-64-v9"):
        build.choose_march("x86-64-v9")


def test_what_this_processor_lacks_is_named(unused, monkeypatch):
    def defines(_compiler, flags):
        return "#define __AVX2__ 1\n" + "#define __AVX10_9__ 1\n" * ("-march=future" in flags)

    monkeypatch.setattr(build, "_defines", defines)
    with pytest.raises(ValueError, match="cannot run march='future': it lacks AVX10_9; choose"):
        build.choose_march("future")


def test_flags_reach_the_compiler(unused):
    build.choose_march("x86-64-v2")
    assert build._chosen_flags == ("-march=x86-64-v2",)


def test_too_late(unused, monkeypatch):
    monkeypatch.setattr(build, "build", lambda *_: (_ for _ in ()).throw(OSError("none")))
    build._load_once()
    with pytest.raises(ValueError, match="comes too late"):
        build.choose_march("x86-64-v2")
