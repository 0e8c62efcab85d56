"""The console command: the scripts by one door."""

import os
import re
import subprocess
import sys

import pytest
from documented import REPOSITORY

from gptvq_jax.__main__ import COMMANDS, as_commands, overview, script, unknown


def gptvq_jax(*words, cwd):
    command = [sys.executable, "-m", "gptvq_jax", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_every_script_is_a_command():
    files = {path.stem.replace("_", "-") for path in (REPOSITORY / "scripts").glob("*.py")}
    assert len(COMMANDS) == len(files) and set(COMMANDS) == files
    assert all(script(command).is_file() for command in COMMANDS)


def test_the_map_has_every_command_with_an_example():
    text = overview()
    lines = text.splitlines()
    for command in COMMANDS:
        at = next(i for i, line in enumerate(lines) if re.match(rf"  {command} +[A-Z]", line))
        assert re.match(rf" +gptvq_jax {command}( --|$)", lines[at + 1])
    assert "scripts/" not in text and ".py" not in text
    assert "smollm2_135m_aqlm" in text


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], []])
def test_the_map_is_shown(words, tmp_path):
    done = gptvq_jax(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0 if words else 1, "")
    assert done.stdout == overview() + "\n"


@pytest.mark.parametrize("words", [["quantize", "--help"], ["help", "quantize"]])
def test_the_flags_of_a_command(words, tmp_path):
    done = gptvq_jax(*words, cwd=tmp_path)
    alone = [sys.executable, script("quantize"), "--help"]
    assert done.returncode == subprocess.run(alone, capture_output=True).returncode
    assert "gptvq_jax quantize --config=smollm2_135m_2d:2b --workdir=runs/mine" in done.stdout
    assert "scripts/" not in done.stdout and "--workdir: Work directory" in done.stdout


@pytest.mark.parametrize(
    "word, message",
    [
        ("quantise", "there is no command 'quantise'; the nearest is 'quantize'; gptvq_jax --help"),
        ("benchmark_decode", "the nearest is 'benchmark-decode'"),
        ("scripts/export.py", "the nearest is 'export'"),
        ("xyz", "there is no command 'xyz'; gptvq_jax --help lists all"),
        ("--config=a", "--config=a comes before a command; write gptvq_jax COMMAND --config=a"),
    ],
)
def test_no_such_command(word, message):
    assert message in unknown(word)


def test_no_such_command_is_one_line(tmp_path):
    done = gptvq_jax("quantise", "--config=x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {unknown('quantise')}\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["quantize"], "--config is missing; --help has examples"),
        (["export", "--checkpoint=x"], "--output is missing; --help has examples"),
        (
            ["quantize", "--config=smollm2_2d"],
            "there is no config 'smollm2_2d': neither a file nor one "
            "that comes with gptvq_jax; the nearest is 'smollm2_135m_2d'",
        ),
        (
            ["ablate", "--config.vq.dimm=2"],  # of the default, which is found by its name
            'no such field of the config: \'dimm\'. Did you mean "dim" instead of "dimm"?; '
            "gptvq_jax/config.py lists all",
        ),
    ],
)
def test_a_command_refuses_flags_as_its_script_does(words, message, tmp_path):
    done = gptvq_jax(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")
    alone = [sys.executable, script(words[0]), *words[1:]]
    again = subprocess.run(alone, capture_output=True, text=True, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (done.returncode, done.stderr)


def test_a_command_runs_with_its_flags(tmp_path):
    (tmp_path / "work").mkdir()
    done = gptvq_jax("benchmark-pipeline", "--workdir=work", cwd=tmp_path)
    message = "error: there is no work/metrics.jsonl; pass the work directory of a run\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_ctrl_c_is_one_line(tmp_path):
    (tmp_path / "c.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = gptvq_jax("quantize", "--config=c.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"]])
def test_help_to_a_closed_pipe(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gptvq_jax", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=REPOSITORY)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"]])
def test_help_to_a_full_disk(words):
    command = [sys.executable, "-m", "gptvq_jax", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=REPOSITORY)
    assert done.returncode == 1
    assert done.stderr == b"error: [Errno 28] No space left on device\n"


def test_version(tmp_path):
    done = gptvq_jax("--version", cwd=tmp_path)
    assert re.fullmatch(r"gptvq_jax \d+\.\d+\.\d+\n", done.stdout) and done.returncode == 0


def test_names_of_scripts_and_configs_as_commands():
    text = "python scripts/benchmark_big_layer.py; --config=configs/a_2d.py:2b; scripts/import.py"
    assert as_commands(text) == "gptvq_jax benchmark-big-layer; --config=a_2d:2b; gptvq_jax import"
    assert as_commands("--config=configs/sweeps/a.py:b") == "--config=sweeps/a:b"
