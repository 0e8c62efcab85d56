"""Runs that cannot be are refused before any work, with what would lower their need."""

import pytest
from tiny_run import model_dir, text_files, tiny_config  # noqa: F401 - fixtures

from gptvq_jax.config import from_config
from gptvq_jax.files import disk_space
from gptvq_jax.files.disk_space import FullDiskError
from gptvq_jax.models.open import open_source
from gptvq_jax.run import memory_check
from gptvq_jax.run.job import quantize


def test_memory_that_is_not_there_is_said_with_the_field(tiny_config, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(memory_check, "host_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"memory of the host: '.*' needs .* GB at least \(") as e:
        quantize(tiny_config, str(tmp_path / "run"))
    assert "lower " in str(e.value) and not (tmp_path / "run").exists()
    monkeypatch.setattr(memory_check, "host_memory", lambda: None)  # a system that does not say
    memory_check.check_memory(open_source(tiny_config.model).config, from_config(tiny_config))


def test_a_disk_that_is_too_small_is_said_before_the_first_pass(tiny_config, tmp_path, monkeypatch):  # noqa: F811
    free = disk_space._free
    monkeypatch.setattr(disk_space, "_free", lambda path: min(free(path), 250_000))
    with pytest.raises(FullDiskError, match=r"at most, while it is at .*calibration\.num_windows"):
        quantize(tiny_config, str(tmp_path / "run"))
    assert not list((tmp_path / "run" / "activations").iterdir())


def test_the_system_says_what_memory_there_is():
    found = memory_check.host_memory()
    assert found is None or found > 2**20
