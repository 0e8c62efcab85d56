"""What a step has beside products, in every instruction set: threads, int8 rows, exponentials."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cpu_instruction_sets import TARGETS

from gptvq_jax.ops.cpu import build

_DAILY = "scalar"  # what compiles fastest


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == _DAILY else pytest.mark.slow) for name in TARGETS],
)
def test_it_agrees_with_the_definition(name, tmp_path):
    compiler, flags, emulator = TARGETS[name]
    if name in ("avx2", "scalar") and platform.machine() != "x86_64":
        pytest.skip("for x86-64")
    if name == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    programs = (compiler,) if compiler else build._COMPILERS
    if not any(map(shutil.which, programs)) or (emulator and not shutil.which(emulator)):
        pytest.skip("a compiler or the emulator is not installed")
    binary = tmp_path / "check"
    source = Path(__file__).with_name("check_step.cc")
    command = [compiler or build.find_compiler(), "-O1", "-std=c++20", *flags, "-pthread"]
    include = f"-I{Path(build.__file__).parent}"
    subprocess.run([*command, include, str(source), "-o", str(binary)], check=True)
    run = [emulator, str(binary)] if emulator else [str(binary)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert name == "native" or done.stdout.startswith(name.split()[0])
