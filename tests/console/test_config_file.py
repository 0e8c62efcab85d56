"""Config files by name: what is found, what is said of what is not."""

import pytest

from gptvq_jax.config import from_config
from gptvq_jax.console.config_file import (
    config_names,
    find_config,
    load_config,
    load_config_of,
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
    with pytest.raises(ValueError, match="smollm2_135m_2d: it is no Python file; .* ends in .py"):
        load_config("smollm2_135m_2d:2b")


@pytest.mark.parametrize(
    "name, message",
    [
        ("smollm_2d", "no config 'smollm_2d': neither a file .*; the nearest is 'smollm2_135m_2d'"),
        ("configs/lama2_7b_2d.py:2b", "'configs/lama2_7b_2d.py': .* nearest is 'llama2_7b_2d'"),
        ("smollm2_135m_2d.py", "'smollm2_135m_2d.py': .* nearest is 'smollm2_135m_2d'"),
        ("", "no config '': .*; those are .*llama2_13b_1d, .*, smollm2_135m_aqlm"),
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
        ("x = 1", "it has no function get_config; configs/ shows how it looks"),
        ("get_config = 1", "it has no function get_config"),
        ("x = 1\ndef get_config(", r"line 2 is no Python \('\(' was never closed\); mend it"),
        ("def get_config(arg):\n    raise ValueError(f'no {arg!r}')", "no 'x'"),
        ("def get_config(arg): pass", "get_config returns nothing; end it with `return config`"),
        ("def get_config(): return 1", "get_config takes no argument; leave out ':x'"),
        ("\nimport nowhere", "line 2 raises ModuleNotFoundError .*'nowhere'.*; mend it"),
        ("def get_config(arg):\n    return vq", "line 2 raises NameError .*'vq'.*; mend it"),
        ("def get_config(arg):\n    open('/none')", "line 2 raises FileNotFoundError .*; mend it"),
        ("def get_config(arg):\n    {}['two\\nlines']", r"line 2 raises KeyError .*; mend it"),
    ],
)
def test_a_file_that_is_no_config(text, message, tmp_path):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path}/c.py: {message}") as caught:
        load_config(f"{tmp_path}/c.py:x")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_an_argument_that_is_missing_is_asked_for(tmp_path):
    (tmp_path / "c.py").write_text("def get_config(arg): return arg\n")
    with pytest.raises(ValueError, match="takes an argument; name one, as in .*/c.py:ARGUMENT$"):
        load_config(f"{tmp_path}/c.py")


def test_a_config_may_have_dataclasses(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += "@dataclass\nclass Own:\n    x: int = 3\ndef get_config(): return Own().x\n"
    (tmp_path / "c.py").write_text(text)
    assert load_config(f"{tmp_path}/c.py") == 3


def test_configs_of_runs_and_of_sweeps_are_told_apart(tmp_path):
    run, sweep = "smollm2_135m_2d", "sweeps/llama2_7b_table2"
    assert load_config_of(run, False).vq.dim == 2 and load_config_of(sweep, True).axes
    with pytest.raises(ValueError, match=f"^{sweep}: .* of a sweep; give it to scripts/sweep.py"):
        load_config_of(sweep, False)
    with pytest.raises(ValueError, match=f"^{run}: .* a run, which scripts/quantize.py takes"):
        load_config_of(run, True)
    with pytest.raises(ValueError, match="of a sweep, not of a run; give it to scripts/sweep.py"):
        from_config(load_config(sweep))  # as from Python
    (tmp_path / "c.py").write_text("def get_config(): return 3\n")
    for kind in (False, True):
        with pytest.raises(ValueError, match="c.py: get_config must return a config, .* not int"):
            load_config_of(f"{tmp_path}/c.py", kind)
