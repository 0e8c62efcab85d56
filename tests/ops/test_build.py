"""Building the C++ kernels: cached, atomic, and clear where it fails."""

import concurrent.futures
import stat

import pytest
from tiny_checkpoint import random_tensor

from gptvq_jax.ops import vq_matmul
from gptvq_jax.ops.cpu import build


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A program in the place of the compiler, which logs its calls and does what the test says."""

    def install(body):
        path = tmp_path / "c++"
        log = tmp_path / "calls"
        path.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(path))
        build._load_once.cache_clear()
        return lambda: log.read_text().splitlines() if log.exists() else []

    yield install
    build._load_once.cache_clear()


# Preprocessing succeeds, and compilation writes the file after -o.
_PREPROCESSES = 'case "$*" in *-dM*) echo "#define X"; exit 0 ;; esac\n'
_WORKS = _PREPROCESSES + 'for last; do :; done; echo lib > "$last"'


def test_built_once_for_each_set_of_flags(compiler, tmp_path):
    calls = compiler(_WORKS)
    cache = tmp_path / "cache"
    first = build.build(cache)
    assert first.read_text() == "lib\n"
    assert build.build(cache) == first
    assert sum("-dM" not in call for call in calls()) == 1
    assert build.build(cache, ("-mavx2",)) != first
    assert "-mavx2" in calls()[-1]
    other = build.build(cache, ("-mavx2",))
    assert set(cache.iterdir()) == {first, other, cache / "lock"}


def test_processes_that_start_together_compile_once(compiler, tmp_path):
    calls = compiler(_PREPROCESSES + "sleep 0.2\n" + _WORKS)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # a lock is of an open file: as processes
        paths = set(pool.map(build.build, [tmp_path / "cache"] * 4))
    assert len(paths) == 1 and sum("-dM" not in call for call in calls()) == 1


def test_a_failing_compiler_is_quoted_and_leaves_nothing(compiler, tmp_path):
    compiler(_PREPROCESSES + 'echo "In file x" >&2; echo "k.cc:3: error: no such" >&2; exit 1')
    cache = tmp_path / "cache"
    with pytest.raises(NotImplementedError, match=r"k.cc:3: error: no such .*set CXX"):
        build.build(cache)
    assert list(cache.iterdir()) == [cache / "lock"]  # which holds nothing


def test_a_compiler_that_failed_is_not_called_again(compiler, tmp_path, monkeypatch):
    calls = compiler("exit 1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(3):
        with pytest.raises(NotImplementedError, match="exit status 1"):
            build.library()
    assert len(calls()) == 1


def test_a_missing_cxx_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(NotImplementedError, match="no g..-99 on the path"):
        build.find_compiler()


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """A file where the cache should be: not even root can write into it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(vq_matmul, "_logged", set())
    build._load_once.cache_clear()
    yield
    build._load_once.cache_clear()


def test_without_a_cache_auto_takes_xla_and_says_so(no_cache, caplog):
    kernel = vq_matmul.make_kernel(random_tensor("int8", 8, 16))
    assert kernel.implementation == "xla"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "auto chose xla" in record.message and "set XDG_CACHE_HOME" in record.message


def test_without_a_cache_the_named_kernel_says_what_moves_it(no_cache):
    message = "'cpu' cannot run: the cache .* cannot be made .*; set XDG_CACHE_HOME to a directory"
    with pytest.raises(NotImplementedError, match=message):
        vq_matmul.make_kernel(random_tensor("int8", 8, 16), "cpu")


def test_a_place_that_fails_while_it_is_written(compiler, tmp_path):
    compiler(_WORKS)
    (tmp_path / "file").touch()
    with pytest.raises(NotImplementedError, match="cannot be written to .*set XDG_CACHE_HOME"):
        build.build(tmp_path / "file/native")


def test_a_library_that_was_cut_off_is_named(tmp_path):
    (tmp_path / "kernels.so").write_bytes(b"\x7fELF")
    with pytest.raises(NotImplementedError, match=r"kernels\.so cannot be loaded .*; remove it"):
        build._load(tmp_path / "kernels.so")
