"""Building the C++ kernels: cached, atomic, and clear where it fails."""

import stat

import pytest

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
    assert sorted(cache.iterdir()) == sorted({first, build.build(cache, ("-mavx2",))})


def test_a_failing_compiler_is_quoted_and_leaves_nothing(compiler, tmp_path):
    compiler(_PREPROCESSES + 'echo "In file x" >&2; echo "k.cc:3: error: no such" >&2; exit 1')
    cache = tmp_path / "cache"
    with pytest.raises(NotImplementedError, match=r"k.cc:3: error: no such .*set CXX"):
        build.build(cache)
    assert list(cache.iterdir()) == []


def test_a_compiler_that_failed_is_not_called_again(compiler, tmp_path, monkeypatch):
    calls = compiler("exit 1")
    monkeypatch.setattr(build, "_cache", lambda: tmp_path / "cache")
    for _ in range(3):
        with pytest.raises(NotImplementedError, match="exit status 1"):
            build.library()
    assert len(calls()) == 1


def test_a_missing_cxx_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(NotImplementedError, match="no g..-99 on the path"):
        build.find_compiler()
