"""Two processes on this machine that do a run together, on one work directory.

They have one device each, and what each of them does is one thread's: they take turns on the cores.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_run import NUM_BLOCKS, config_file

from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.models.stages import LINEAR_GROUPS
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.tensor_io import tensor_to_state

SCRIPT = Path(__file__).parents[2] / "scripts" / "quantize.py"
PASSES = (  # with token weights and an asymmetric target: a walk up, one down, and one up
    "config.vq.group_size, config.vq.em_iterations, config.vq.seed = 256, 1, 'mahalanobis'",
    "config.vq.dim, config.vq.bits, config.calibration.batch_size = 2, 1.0, 3",
    "config.calibration.gradient_groups = 1",
)
BOUND = 90  # seconds for a process to notice that it is alone, of which the heartbeat is 30


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(config: Path, workdir: Path, *flags: str, env=None) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), f"--config={config}", f"--workdir={workdir}", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def start_two(config: Path, workdir: Path, *flags: str, others=()) -> list[subprocess.Popen]:
    """`others` are flags of process 1 alone."""
    where = ["--distributed", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    return [
        start(config, workdir, *where, *flags, f"--process_id={index}", *(others if index else ()))
        for index in range(2)
    ]


def ended(processes, seconds=600) -> list[tuple[int, str, str]]:
    try:
        found = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, found, strict=True)]


def codes(workdir: Path) -> dict:
    """Of all layers."""
    checkpoint, found = PackedCheckpoint(workdir / "checkpoint"), {}
    for index in range(NUM_BLOCKS):
        for part, layers in checkpoint.packed_block(index).items():
            for name, leaves in layers.items():
                tensor = leaves.get("kernel") if isinstance(leaves, dict) else None
                if isinstance(tensor, QuantizedTensor):
                    found[f"{index}/{part}/{name}"] = tensor_to_state(tensor)[0]
    return found


def relative_errors(workdir: Path) -> dict[str, float]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    layers = (row for row in rows if row["kind"] == "layer")
    return {f"{row['block']}/{row['layer']}": row["relative_error"] for row in layers}


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def config(model_dir, text_files, tmp_path_factory):
    return config_file(tmp_path_factory.mktemp("config") / "c.py", model_dir, text_files, *PASSES)


@pytest.fixture(scope="module")
def together(config, tmp_path_factory):
    """The directory of a run of two processes, and what each of them said."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    found = ended(start_two(config, workdir))
    assert [status for status, _, _ in found] == [0, 0], found
    return workdir, found


@pytest.mark.slow
def test_two_processes_find_what_two_devices_of_one_find(config, together, tmp_path):
    """Sums over windows are of as many parts, but not added by the same code: the same codes where
    nothing else has been rounded yet, and errors that are as large everywhere.
    """
    workdir, ((_, said, _), (_, nothing, quiet)) = together
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    ((status, _, error),) = ended([start(config, tmp_path / "alone", env={"XLA_FLAGS": flags})])
    assert status == 0, error
    alone, two = codes(tmp_path / "alone"), codes(workdir)
    assert alone.keys() == two.keys() and alone
    for name in LINEAR_GROUPS[0]:
        same = np.mean(alone[f"0/{name}"]["codes"] == two[f"0/{name}"]["codes"])
        assert same > 0.98, (name, same)
    errors = [relative_errors(path) for path in (tmp_path / "alone", workdir)]
    for name, error in errors[0].items():
        assert errors[1][name] == pytest.approx(error, rel=0.5), name
    assert np.mean(list(errors[1].values())) == pytest.approx(
        np.mean(list(errors[0].values())), rel=0.1
    )
    ours, theirs = summary(tmp_path / "alone"), summary(workdir)
    assert theirs["perplexity_float"] == pytest.approx(ours["perplexity_float"], rel=1e-5)
    assert theirs["perplexity_quantized"] == pytest.approx(ours["perplexity_quantized"], rel=0.1)
    assert "2 devices of 2 processes share the rows of every layer" in said
    assert "perplexity" in said and "perplexity" not in nothing and "quantize:" not in quiet
    for name in ("checkpoint/manifest.json", "report.png", "command.txt", "evaluation/figures.npy"):
        assert (workdir / name).exists(), name
    assert not list(workdir.rglob("*.partial"))


@pytest.mark.slow
def test_one_of_them_is_killed_and_the_same_command_goes_on(config, together, tmp_path):
    """To the same bytes; the other process has ended by itself, with a line that says why."""
    workdir = tmp_path / "run"
    first, second = start_two(config, workdir)
    block = workdir / "checkpoint" / "blocks" / "00000" / "record.json"
    deadline = time.monotonic() + 300
    while not block.exists():
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    ((status, _, error),) = ended([first], BOUND)
    assert status == 1, error
    assert "another process of this run has ended" in error.splitlines()[-1]
    assert "give the same command on every host again" in error.splitlines()[-1]
    second.communicate()
    assert not (workdir / "checkpoint" / "manifest.json").exists()
    found = ended(start_two(config, workdir))
    assert [status for status, _, _ in found] == [0, 0], found
    assert summary(workdir)["resumed_at"] >= 1
    for name, arrays in codes(together[0]).items():
        for part, array in codes(workdir)[name].items():
            np.testing.assert_array_equal(array, arrays[part], err_msg=f"{name} {part}")


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(config, tmp_path):
    others = ["--config.vq.em_iterations=2"]
    found = ended(start_two(config, tmp_path / "run", others=others))
    assert [status for status, _, _ in found] == [1, 1]
    assert any(
        "process 1 has other settings, or another model, than process 0" in error
        for _, _, error in found
    )


@pytest.mark.slow
def test_without_the_flag_two_processes_are_refused(config, together):
    """Whoever finds the directory taken says so."""
    ((status, _, error),) = ended([start(config, together[0], "--process_id=1")])
    assert status == 1 and "--process_id has no effect without --distributed; add it" in error
    found = [start(config, together[0].parent / "other") for _ in range(2)]
    found = ended(found)
    refused = [error for status, _, error in found if status == 1]
    assert len(refused) == 1 and "another process is using the work directory" in refused[0]


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--coordinator=a:1"], "--coordinator needs --num_processes beside it"),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 must be below --num_processes=2",
        ),
        ([], "start the same command on every host within"),
    ],
)
@pytest.mark.slow
def test_flags_that_do_not_fit_are_refused(config, tmp_path, flags, line):
    ((status, _, error),) = ended([start(config, tmp_path / "run", "--distributed", *flags)])
    assert status == 1 and line in error.splitlines()[-1] and not (tmp_path / "run").exists()
