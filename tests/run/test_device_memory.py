"""Out of memory on a device: one line that names the stage and what lowers its need."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_run import model_dir, text_files, tiny_config  # noqa: F401 - fixtures

from gptvq_jax.config import default_config
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.run import evaluate, gradients, job, packed_block
from gptvq_jax.run.device_memory import LOWERED_BY, DeviceMemoryError, explained

ON_THE_HOST = {"open model", "read text", "load model", "load block", "embed", "save"}


def full(*_, **__):
    """A petabyte, which no device has."""
    return jax.block_until_ready(jnp.zeros(2**48))


def test_every_stage_that_computes_has_a_setting():
    folder = Path(job.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    stages = {name for line in re.findall(r"\.stage\((.*)", text) for name in _quoted(line)}
    assert stages == {*LOWERED_BY, *ON_THE_HOST}


def _quoted(line: str) -> list[str]:
    return re.findall(r'"([^"]*)"', line.partition(", context.files")[0])


def test_the_settings_exist():
    config = default_config()
    for how in LOWERED_BY.values():
        fields = re.findall(r"\b([a-z_]+)\.([a-z_]+)", how)
        assert fields
        for section, field in fields:
            assert field in config[section]


@pytest.mark.parametrize(
    "module, function, stage",
    [
        (packed_block, "run_windows", "hessians"),
        (packed_block, "quantize_layers", "quantize"),
        (gradients, "block_backward", "gradients"),
        (evaluate, "block_forward", "evaluate"),
    ],
)
def test_a_run_says_which(tiny_config, tmp_path, monkeypatch, module, function, stage):  # noqa: F811
    tiny_config.calibration.gradient_groups = int(stage == "gradients")
    monkeypatch.setattr(module, function, full)
    with pytest.raises(DeviceMemoryError) as error:
        job.quantize(tiny_config, str(tmp_path / "run"))
    assert f"in stage '{stage}' (RESOURCE_EXHAUSTED" in str(error.value)
    assert f"; lower {LOWERED_BY[stage]}; " in str(error.value) and "\n" not in str(error.value)


def test_the_innermost_stage_is_named():
    stopwatch = Stopwatch()
    expected = pytest.raises(DeviceMemoryError, match="'tune' .* lower tune.batch_size")
    with expected, explained(stopwatch), stopwatch.stage("evaluate"), stopwatch.stage("tune"):
        full()


def test_other_errors_are_left_alone():
    with pytest.raises(jax.errors.JaxRuntimeError, match="^INTERNAL: broken$"), explained():
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")
