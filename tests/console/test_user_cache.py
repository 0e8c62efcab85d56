"""The user's cache, where there is one; else what to set."""

from pathlib import Path

import pytest

from gptvq_jax.console.user_cache import user_cache


def test_the_variable_moves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    assert user_cache("xla") == tmp_path / "new/gptvq_jax/xla"
    assert user_cache("xla").is_dir()


@pytest.mark.parametrize("value", ["", "relative/path", None])
def test_what_is_no_path_does_not_count(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value or "")
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache("native") == tmp_path / ".cache/gptvq_jax/native"


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_no_home_and_no_place_to_write_name_the_variable(tmp_path, monkeypatch):
    fix = "set XDG_CACHE_HOME to a directory that can be written"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=rf"file/gptvq_jax/xla cannot be made \(.*\); {fix}"):
        user_cache("xla")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(OSError, match=f"the home directory relative is not an absolute .*{fix}"):
        user_cache("xla")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match=f"there is no home directory for a cache; {fix}"):
        user_cache("xla")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as on a read-only mount
    with pytest.raises(OSError, match="gptvq_jax/xla cannot be written; set XDG_CACHE_HOME"):
        user_cache("xla")
