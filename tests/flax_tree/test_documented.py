"""The code of docs/flax_models.md runs, and its table is what comes out."""

import re

import numpy as np
import pytest
from documented import REPOSITORY, python_blocks

from gptvq_jax.ops import vq_matmul

TEXT = (REPOSITORY / "docs/flax_models.md").read_text()


def run(block, names=None):
    names = {} if names is None else names
    exec(compile(block, "docs/flax_models.md", "exec"), names)
    return names


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setitem(vq_matmul._PREFERRED, "cpu", ("xla",))  # no C++ to compile


@pytest.mark.slow
def test_the_short_ones_run(no_compiler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, of_a_function, of_nnx = python_blocks(TEXT)
    names = run(of_a_function)
    np.testing.assert_allclose(names["same"], names["y"], rtol=1e-5, atol=1e-5)
    names = run(of_nnx)
    np.testing.assert_allclose(names["model"](names["x"]), names["y"], rtol=1e-5, atol=1e-5)
    assert (tmp_path / "packed/kernels.json").is_file()


@pytest.mark.slow
def test_the_vision_transformer_has_the_bits_of_the_table(no_compiler, capsys):
    """Accuracies move with the processor, by what a training on another one moves them."""
    rows = re.findall(r"^\| (\w+(?: \d)?) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    run(python_blocks(TEXT)[0])
    printed = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [(name, bits) for name, _, bits in printed] == [(name, bits) for name, _, bits in rows]
    accuracy = {name: float(correct) for name, correct, _ in printed}
    for name, correct, _ in rows[:4]:
        assert abs(accuracy[name] - float(correct)) < 0.1
    assert accuracy["vq 2"] > accuracy["rtn 2"] and accuracy["float"] - accuracy["vq 3"] < 0.05
