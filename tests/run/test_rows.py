"""A run on several devices: the checkpoint of one device, to the last byte."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from documented import REPOSITORY
from tiny_run import config_file, model_dir, text_files  # noqa: F401 - fixtures

from gptvq_jax.core.mesh import use_devices, work_mesh
from gptvq_jax.storage.checkpoint import PackedCheckpoint

MORE = (
    "config.vq.bits, config.vq.group_size, config.vq.em_iterations = 1.0, 384, 1",
    "config.vq.row_scales, config.evaluation.num_windows = True, 1",
    "config.calibration.statistics, config.calibration.inputs = {file!r}, 'float'",
    "config.calibration.asymmetry, config.true_sequential = 0.0, False",
)


def command(script: str, *arguments: str, devices: int) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / script), *arguments],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def stored(directory: Path) -> tuple[bytes, list]:
    """The manifest, and every array; beside them Orbax notes paths and the time."""
    packed = PackedCheckpoint(directory)
    blocks = map(packed.packed_block, range(packed.config.num_hidden_layers))
    arrays = map(np.asarray, jax.tree.leaves([packed.packed_outer(), *blocks]))
    manifest = (directory / "manifest.json").read_bytes()
    return manifest, [(array.dtype, array.shape, array.tobytes()) for array in arrays]


@pytest.mark.slow
def test_the_same_checkpoint_on_four_devices_and_on_one_of_them(model_dir, text_files, tmp_path):  # noqa: F811
    # Hessians from a file: what is summed over windows is another thing.
    text = config_file(tmp_path / "text.py", model_dir, text_files)
    file = str(tmp_path / "statistics")
    command("calibrate.py", f"--config={text}", f"--output={file}", devices=1)
    more = (line.format(file=file) for line in MORE)
    config = config_file(tmp_path / "run.py", model_dir, text_files, *more)
    found = []
    for name, flags in (("all", ()), ("one", ("--devices=1",))):
        path = tmp_path / name
        command("quantize.py", f"--config={config}", f"--workdir={path}", *flags, devices=4)
        found.append(stored(path / "checkpoint"))
    several, one = found
    assert len(one[1]) > 3 and several == one


@pytest.mark.parametrize("count", [-1, 2])
def test_devices_that_are_not_there(count):
    there = work_mesh().size
    with pytest.raises(ValueError, match=f"devices={count * there} must be 1 to {there}, .*or 0"):
        use_devices(count * there)
    assert work_mesh().size == there
