"""Config files by name: what is found, what is said of what is not."""

import pytest

from gptvq_jax.config import from_config
from gptvq_jax.console.config_file import (
    config_names,
    find_config,
    load_config,
    printed_config,
)
from gptvq_jax.console.shipped import shipped

FILE = "def get_config(arg='none'):\n    return arg\n"


def test_a_config_that_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from any directory
    path = shipped("configs") / "smollm2_135m_2d.py"
    assert path.is_file() and "smollm2_135m_2d" in config_names()
    assert find_config("smollm2_135m_2d") == str(path)
    assert find_config("smollm2_135m_2d:2b") == f"{path}:2b"
    settings = from_config(load_config("smollm2_135m_2d:2b"))
    assert settings.allocation.bits_per_value == 2.125


def test_a_config_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "sweeps/smollm2_dimensionality"
    path = shipped("configs") / f"{name}.py"
    assert name in config_names() and find_config(f"{name}:smoke") == f"{path}:smoke"
    for spelling in (name, str(path)):
        assert printed_config(f"{spelling}:smoke") == f"configs/{name}.py:smoke"
    assert printed_config("mine/c.py:2b") == "mine/c.py:2b"


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    assert find_config("mine.py:a:b") == "mine.py:a:b"
    assert load_config("mine.py") == "none"
    assert load_config(f"{tmp_path}/mine.py:a:b") == "a:b"
    assert load_config("mine.py:") == ""  # an argument, if an empty one
    (tmp_path / "smollm2_135m_2d").write_text("text")
    with pytest.raises(ValueError, match="smollm2_135m_2d is no Python file; .* ends in .py"):
        load_config("smollm2_135m_2d:2b")


@pytest.mark.parametrize(
    "name, message",
    [
        ("smollm_2d", "no config 'smollm_2d': neither a file .*; the nearest is 'smollm2_135m_2d'"),
        ("configs/lama2_7b_2d.py:2b", "'configs/lama2_7b_2d.py': .* nearest is 'llama2_7b_2d'"),
        ("smollm2_135m_2d.py", "'smollm2_135m_2d.py': .* nearest is 'smollm2_135m_2d'"),
        ("", "no config '': .*; those are llama2_13b_1d, .*, smollm2_135m_aqlm"),
        ("..", "no config '..': .*; those are"),
    ],
)
def test_neither_a_file_nor_a_name(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for find in (find_config, load_config):
        with pytest.raises(ValueError, match=message):
            find(name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "c.py has no function get_config"),
        ("def get_config(", "c.py is no Python file: "),
        ("def get_config(arg):\n    raise ValueError(f'no {arg!r}')", "no 'x'"),
    ],
)
def test_a_file_that_is_no_config(text, message, tmp_path):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(f"{tmp_path}/c.py:x")
