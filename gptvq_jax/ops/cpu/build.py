"""Builds the C++ kernels once with the system's compiler, and registers them with JAX.

The library goes to the user's cache, under a name that changes with the sources, the compiler and
the instruction set of this machine.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from gptvq_jax.console.errors import first_line
from gptvq_jax.console.user_cache import VARIABLE, user_cache

_SOURCES = (
    "kernels.cc",
    "attention.h",
    "block.h",
    "block_call.h",
    "products.h",
    "packed.h",
    "lookup.h",
    "direct.h",
    "activations.h",
    "batch.h",
    "int4.h",
    "int8_rows.h",
    "int8_rows_call.h",
    "parallel.h",
    "simd.h",
    "simd_avx2.h",
    "simd_avx512.h",
    "simd_neon.h",
    "simd_scalar.h",
    "team.h",
    "trellis.h",
    "trellis_call.h",
    "trellis_runs.h",
    "trellis_simd.h",
    "vector_math.h",
    "viterbi.h",
    "vq_call.h",
)
_TARGETS = (
    "vq_matmul",
    "vq_direct_matmul",
    "int4_matmul",
    "viterbi",
    "trellis_matmul",
    "trellis_int8_matmul",
    "block_step",
    "int8_rows_matmul",
)
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")
_WHAT = "the C++ compiler"
_HINT = "g++ 11 or clang++ 14 will do; set CXX to choose another"
_SECONDS = 300
_INSTRUCTIONS = re.compile(r"#define __((?:AVX|SSE|FMA|F16C|BMI|ARM_FEATURE_)\w*?)__? 1\b")
_chosen_flags: tuple[str, ...] = ()


def choose_march(name: str) -> None:
    """Compiles for -march=`name` from here on instead of for this processor.

    Args:
      name: as the compiler knows it, such as x86-64-v3 (AVX2) or x86-64 (no vectors of ours).

    Raises:
      ValueError: the compiler does not know it, this processor cannot run it, or the kernels are
        in use already.
      NotImplementedError: there is no compiler.
    """
    global _chosen_flags
    if _load_once.cache_info().currsize:
        raise ValueError(f"march={name!r} comes too late: the CPU kernels are in use already")
    compiler = find_compiler()
    native = set(_INSTRUCTIONS.findall(_defines(compiler, _FLAGS)))
    flags = (f"-march={name}",)
    try:
        missing = set(_INSTRUCTIONS.findall(_defines(compiler, (*_FLAGS, *flags)))) - native
    except NotImplementedError as error:
        raise ValueError(f"march={name!r} is not known: {error}") from None
    if missing:
        raise ValueError(
            f"this processor cannot run march={name!r}: it lacks {', '.join(sorted(missing))}; "
            "choose an older one, or native"
        )
    _chosen_flags = flags


def library() -> ctypes.CDLL:
    """The kernels, built if need be and registered as jax.ffi targets "gptvq_<name>".

    Raises:
      NotImplementedError: there is no compiler, it fails, or what it makes cannot be kept; the
        message says why.
    """
    loaded = _load_once()
    if isinstance(loaded, str):
        raise NotImplementedError(loaded)
    return loaded


@functools.cache
def _load_once() -> ctypes.CDLL | str:
    """The library, or why there is none: a compiler that failed is not called again."""
    try:
        loaded = _load(build(user_cache("native"), _chosen_flags))
    except (NotImplementedError, OSError) as error:
        return str(error)
    for name in _TARGETS:
        target = jax.ffi.pycapsule(getattr(loaded, name))
        jax.ffi.register_ffi_target(f"gptvq_{name}", target, platform="cpu")
    loaded.simd_name.restype = ctypes.c_char_p
    return loaded


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # cut off by a power loss; or its file system allows no programs
        raise NotImplementedError(
            f"{path} cannot be loaded ({first_line(error)}); remove it, or set {VARIABLE} to a "
            "directory that programs can run from"
        ) from None


def instruction_set() -> str:
    """What the kernels were compiled for: avx512, avx2, neon or scalar."""
    return library().simd_name().decode()


def library_key() -> str:
    """Names the kernels: it changes with their sources, the compiler and the instruction set."""
    return Path(library()._name).stem


def build(cache: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compiles the kernels into `cache`, unless it holds them.

    Args:
      cache: directory, made if missing.
      extra_flags: for the compiler, such as -march=x86-64-v3; later flags win.

    Returns:
      Path of the shared library.

    Raises:
      NotImplementedError: as `library`.
    """
    flags = (*_FLAGS, *extra_flags)
    compiler = find_compiler()
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    # What the compiler defines tells its version and every instruction set in use.
    defines = _defines(compiler, flags)
    key = hashlib.sha256(repr((defines, flags, jax.__version__)).encode())
    for source in sources:
        key.update(source.read_bytes())
    target = cache / f"kernels-{key.hexdigest()[:20]}.so"
    include = ["-isystem", jax.ffi.include_dir()]
    command = [compiler, *flags, *include, str(sources[0])]
    return build_once(target, command, "the CPU kernels", _WHAT, _HINT)


def build_once(target: Path, command: list[str], made: str, what: str, hint: str) -> Path:
    """Has a compiler make the library `target`, unless it is there.

    Args:
      target: in a directory that is made if missing.
      command: all but the name of what it makes.
      made: what the command makes, for who waits.
      what: the compiler, for who reads that it failed.
      hint: what to do then.

    Raises:
      NotImplementedError: the compiler fails, or its directory cannot be written.
    """
    if not target.exists():
        cache = target.parent
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(cache / "lock"):
                if not target.exists():  # nor made by the process that was waited for
                    _compile(command, target, made, what, hint)
        except OSError as error:
            raise NotImplementedError(
                f"the kernels cannot be written to {cache} ({error.strerror}); set {VARIABLE} to a "
                "directory that can be written"
            ) from None
    return target


def _defines(compiler: str, flags: tuple[str, ...]) -> str:
    command = [compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    return run_compiler(command, _WHAT, _HINT)


def _compile(command: list[str], target: Path, made: str, what: str, hint: str) -> None:
    print(f"compiling {made} with {command[0]}, once ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        run_compiler([*command, "-o", str(built)], what, hint)
        built.replace(target)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock of one that dies."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_compiler() -> str:
    """$CXX, or the first C++ compiler on the path."""
    for name in [os.environ.get("CXX"), *_COMPILERS]:
        if name and shutil.which(name):
            return name
    wanted = os.environ.get("CXX") or " or ".join(_COMPILERS)
    raise NotImplementedError(
        f"it needs a C++ compiler and there is no {wanted} on the path (install g++, or set CXX)"
    )


def run_compiler(command: list[str], what: str, hint: str) -> str:
    """What a compiler prints. Raises NotImplementedError with its first error and a hint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotImplementedError(f"{what} failed: {first_line(error)}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise NotImplementedError(f"{what} {command[0]} failed: {line.strip()} ({hint})")
    return done.stdout
