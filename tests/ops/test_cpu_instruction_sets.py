"""The C++ kernels in every instruction set they are written for, compiled here or across.

check_kernels.cc and check_trellis.cc compare them with the definition in double precision, at every
width of a code and every dimension. Programs for Arm run in an emulator. All are slow to compile;
test_cpu.py and test_cpu_trellis.py test the kernels of this machine.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from gptvq_jax.ops.cpu import build

pytestmark = pytest.mark.slow

# Without optimization, with which sanitizers take half a minute to compile.
_SANITIZE = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g0")
# name -> (compiler, flags, emulator)
_ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64-static")
TARGETS = {
    "native": (None, ("-march=native", *_SANITIZE), None),
    "avx2": (None, ("-march=x86-64-v3",), None),
    "scalar": (None, ("-march=x86-64",), None),
    "neon": (_ARM[0], ("-march=armv8-a", "-static"), _ARM[1]),
    "neon dotprod": (_ARM[0], ("-march=armv8.2-a+dotprod", "-static"), _ARM[1]),
}


@pytest.mark.parametrize("program", ["check_kernels.cc", "check_trellis.cc"])
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_agree_with_the_definition(name, program, tmp_path):
    compiler, flags, emulator = TARGETS[name]
    if name in ("avx2", "scalar") and platform.machine() != "x86_64":
        pytest.skip("for x86-64")
    if name == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    for needed in filter(None, (compiler, emulator)):
        if not shutil.which(needed):
            pytest.skip(f"{needed} is not installed")
    binary = tmp_path / "check"
    source = Path(__file__).with_name(program)
    include = f"-I{Path(build.__file__).parent}"
    command = [compiler or build.find_compiler(), "-O1", "-std=c++20", *flags, include]
    subprocess.run([*command, str(source), "-o", str(binary)], check=True)
    run = [emulator, str(binary)] if emulator else [str(binary)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert name == "native" or done.stdout.startswith(name.split()[0])
