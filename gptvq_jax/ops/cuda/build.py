"""Builds the CUDA kernels once with nvcc, for the GPU that is here, and registers them with JAX.

Where the CPU kernels go, by the same rules; see ops/cpu/build.py.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

import jax

from gptvq_jax.console.user_cache import user_cache
from gptvq_jax.ops.cpu.build import build_once, run_compiler

TARGET = "gptvq_cuda_product"
SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cu", "decode.h"))
# The stores of nvcc from pip, and of an installed toolkit.
_WHEELS = ("cu13/bin/nvcc", "cuda_nvcc/bin/nvcc")
_HOMES = ("CUDA_HOME", "CUDA_PATH")
_FLAGS = ("-O3", "-std=c++17")
_SHARED = ("-shared", "-Xcompiler", "-fPIC", "--cudart=static")
_HINT = (
    "pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime "
    "nvidia-cuda-cccl, install the CUDA toolkit, or set NVCC"
)


def load() -> None:
    """Has the kernel built and registered as the jax.ffi target TARGET.

    Raises:
      NotImplementedError: there is no nvcc or no NVIDIA GPU, nvcc fails, or what it makes cannot be
        kept; the message says why.
    """
    reason = _load_once()
    if reason:
        raise NotImplementedError(reason)


@functools.cache
def _load_once() -> str | None:
    """Why there is no kernel: a compiler that failed is not called again."""
    try:
        path = build(user_cache("native"), _architecture())
        library = ctypes.CDLL(str(path))
    except (NotImplementedError, OSError) as error:
        return str(error)
    register(library, "CUDA")
    return None


def register(library: ctypes.CDLL, platform: str) -> None:
    """Makes TARGET the kernel of a library, for programs of a platform as jax.ffi names it."""
    target = jax.ffi.pycapsule(library.packed_product)
    jax.ffi.register_ffi_target(TARGET, target, platform=platform)


def build(cache: Path, architecture: str) -> Path:
    """Compiles the kernels for an architecture, such as sm_90, unless `cache` holds them.

    Returns:
      Path of the shared library.

    Raises:
      NotImplementedError: as `load`.
    """
    nvcc = find_nvcc()
    command = [*compile_command(nvcc, architecture), *_SHARED, str(SOURCES[0])]
    libraries = Path(nvcc).resolve().parent.parent / "lib"  # of the wheels, which nvcc does not ask
    if libraries.is_dir():
        command.append(f"-L{libraries}")
    version = run_compiler([nvcc, "--version"], "nvcc", _HINT)
    key = hashlib.sha256(repr((version, command[1:], jax.__version__)).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    target = cache / f"cuda-{key.hexdigest()[:20]}.so"
    return build_once(target, command, "the CUDA kernels", "nvcc", _HINT)


def compile_command(nvcc: str, architecture: str) -> list[str]:
    """nvcc with all that concerns what it makes of the kernels."""
    # The headers of jax.ffi are not ours: nvcc has warnings for them and no -isystem that stops it.
    return [nvcc, "-w", *_FLAGS, f"-arch={architecture}", f"-I{jax.ffi.include_dir()}"]


def find_nvcc() -> str:
    """$NVCC, or nvcc of the path, of $CUDA_HOME, or of the wheels beside this Python's packages."""
    if named := os.environ.get("NVCC"):
        if not shutil.which(named):
            raise NotImplementedError(f"it needs nvcc and NVCC={named} is no program ({_HINT})")
        return named
    if found := shutil.which("nvcc"):
        return found
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    places = [Path(folder) / wheel for folder in folders for wheel in _WHEELS]
    places += [Path(os.environ[home]) / "bin/nvcc" for home in _HOMES if os.environ.get(home)]
    for place in places:
        if found := shutil.which(place):
            return found
    raise NotImplementedError(f"it needs nvcc and there is none here ({_HINT})")


def _architecture() -> str:
    """Of the first GPU, as nvcc names it. dp4a needs 6.1."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None or "gfx" in str(capability):
        raise NotImplementedError(f"it needs an NVIDIA GPU, and {device.device_kind} is none")
    return f"sm_{str(capability).replace('.', '')}"
