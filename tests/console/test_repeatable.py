"""What XLA is asked for where there may be a GPU."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from documented import REPOSITORY

from gptvq_jax.console import repeatable

FLAG = "--xla_gpu_deterministic_ops=true"


@pytest.mark.parametrize(
    "plugin, platforms, given, expected",
    [
        ("xla_cuda13", "", "", FLAG),
        ("xla_cuda13", "cuda,cpu", "--xla_dump_to=a", f"--xla_dump_to=a {FLAG}"),
        ("xla_rocm7", "", "", FLAG),
        ("xla_cuda13", "cpu", "", ""),
        ("libtpu", "", "", ""),
        (
            "xla_cuda13",
            "",
            "--xla_gpu_deterministic_ops=false",
            "--xla_gpu_deterministic_ops=false",
        ),
    ],
)
def test_flags_where_jax_may_find_a_gpu(plugin, platforms, given, expected, monkeypatch):
    found = [EntryPoint(plugin, f"jax_plugins.{plugin}", "jax_plugins")]
    monkeypatch.setattr(repeatable, "entry_points", lambda group: found * (group == "jax_plugins"))
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    repeatable.ask_for_repeatable_results()
    assert os.environ["XLA_FLAGS"] == expected


def test_scripts_ask_before_jax_starts(tmp_path):
    """Of a process whose environment has a plugin for GPUs by name alone."""
    record = tmp_path / "fake_gpu-1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-gpu\nVersion: 1\n")
    (record / "entry_points.txt").write_text("[jax_plugins]\nxla_cuda99 = jax_plugins.none\n")
    program = (
        "import os, sys; sys.argv[1:] = []\n"
        "from gptvq_jax.console import cli\n"
        "cli.run(lambda _: print(os.environ['XLA_FLAGS']))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == FLAG, done.stderr
