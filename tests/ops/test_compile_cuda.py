"""The CUDA kernels compiled and disassembled for a GPU that is not there: needs nvcc, not a GPU.

pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl \
    nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm && python -m pytest THIS_FILE -m slow
"""

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import jax
import pytest
from real_shapes import abstract_tensor

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.ops.cuda import build, layout
from gptvq_jax.study.sample_tensors import TensorFormat

_CODE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?(\S+) ?(.*?);")
_NAME = re.compile(r"product_kernelILi(\d)ELi(\d)ELi(\d)ELi(\d)E")
# Of an H100: bytes a second, and lanes a second of all its integer pipes and of its issue.
_BYTES, _INTEGERS, _ISSUES = 3.35e12, 132 * 64 * 1.7e9, 132 * 128 * 1.7e9
# Of what goes through the integer pipe of 64 lanes; products and conversions go through others.
_PIPE = {"PRMT", "LOP3", "SHF", "IADD3", "LEA", "ISETP", "SEL", "MOV"}

pytestmark = pytest.mark.slow


def _nvcc() -> str:
    try:
        return build.find_nvcc()
    except NotImplementedError as error:
        pytest.skip(str(error))


def _cuobjdump(nvcc: str) -> str:
    beside = Path(shutil.which(nvcc)).resolve().with_name("cuobjdump")
    return shutil.which(beside) or shutil.which("cuobjdump") or pytest.skip("no cuobjdump")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    _cuobjdump(_nvcc())  # or skip before minutes of work
    return build.build(tmp_path_factory.mktemp("cuda"), "sm_90")


@pytest.fixture(scope="module")
def loops(built):
    """(D, rows, digits, batch) -> how often each instruction is in the loop over columns."""
    command = [_cuobjdump(_nvcc()), "--dump-sass", str(built)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for function in text.split("Function : ")[1:]:
        name = _NAME.search(function.split("\n", 1)[0])
        if name:
            found[tuple(map(int, name.groups()))] = _loop(function)
    return found


def _loop(function: str) -> Counter:
    """Instructions from where the longest jump back leads to the jump."""
    code = [(int(at, 16), name, rest) for at, name, rest in _CODE.findall(function)]
    jumps = [(int(rest.split()[-1], 16), at) for at, name, rest in code if name.startswith("BRA")]
    first, last = max(jumps, key=lambda jump: jump[1] - jump[0])
    return Counter(name.split(".")[0] for at, name, _ in code if first <= at <= last)


def test_the_library_links_and_has_the_target(built):
    assert ctypes.CDLL(str(built)).packed_product


def test_every_kernel_looks_up_by_permutation_and_keeps_to_registers(loops):
    assert len(loops) == 3 * 2 * 2 * 2  # D, rows, digits, batch
    for (dim, rows, digits, batch), loop in loops.items():
        assert loop["IDP"] == 4 * dim * rows * digits * batch  # two words of four, two places
        assert loop["PRMT"] >= 12 * dim * rows
        assert not loop["STL"] + loop["LDL"], (dim, rows, digits, batch)
        assert not loop["LDS"] + loop["CALL"]


def test_four_times_the_speed_of_bfloat16_is_predicted(loops):
    grid = GroupGrid(8192, 28672, 2, 8, 256)
    tensor = abstract_tensor(TensorFormat(2, 4, 2048), grid.rows, grid.cols)
    assert tensor.grid == grid  # 2.125 bits: 4 for 2 weights, 256 for 2048; and a scale
    packed = jax.eval_shape(layout.pack, tensor)
    read = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
    assert read == 62_849_024
    loop = loops[2, 8, 2, 1]
    vectors = grid.rows * grid.cols / 2 / (2 * 8 * 8)  # of a pass of the loop: 2 words, 8 rows
    bfloat16 = 2 * grid.rows * grid.cols / _BYTES
    # If every instruction went through a pipe of 64 lanes, which is more than they can ask for.
    slowest = loop.total() * vectors / _INTEGERS
    likely = max(
        read / _BYTES,
        sum(loop[name] for name in _PIPE) * vectors / _INTEGERS,
        loop.total() * vectors / _ISSUES,
    )
    print(f"{loop.total() / 128:.2f} a vector, {1e6 * slowest:.1f} us, {1e6 * likely:.1f} us")
    assert bfloat16 / slowest > 4
    assert bfloat16 / likely > 6
