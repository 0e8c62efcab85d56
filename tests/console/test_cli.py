"""What all scripts share: how they end, by a mistake, by Ctrl-C, by a closed pipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from gptvq_jax.console import cli

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {repository!r})
from gptvq_jax.console import cli
cli._keep_compiled_programs = lambda: None  # which imports JAX: 3 s
ctrl_c = lambda: os.kill(os.getpid(), signal.SIGINT)
def main(_):
    {body}
cli.run(main, "doc")
"""


def script(body, tmp_path, *words, **options):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(repository=str(REPOSITORY), body=body.replace("\n", "\n    ")))
    line = [sys.executable, str(path), *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(line, text=True, timeout=30, **streams)


@pytest.mark.parametrize(
    "body",
    [
        "ctrl_c()\ntime.sleep(9)",
        # np.savez ends so when it is interrupted: the archive cannot be closed.
        "try:\n    ctrl_c()\nfinally:\n    raise ValueError('cannot close the ZIP file')",
        "try:\n    ctrl_c()\nexcept BaseException:\n    raise OSError('partly written') from None",
        # Python drops what a finalizer raises, and goes on.
        "class Weak:\n    def __del__(self): ctrl_c()\nWeak()\ntime.sleep(9)",
        # A module in C++ may abort if its import ends in an exception.
        "sys.path.insert(0, os.path.dirname(__file__))\nimport imported",
        "try:\n    ctrl_c()\nfinally:\n    ctrl_c()\n    time.sleep(9)",
        "import atexit\natexit.register(ctrl_c)",
        "import threading\nthreading.Thread(target=lambda: time.sleep(9)).start()\nctrl_c()",
        "raise KeyboardInterrupt",
        # Orbax still writes when the directory below it is cleared away.
        "import threading\nthread = threading.Thread(target=lambda: time.sleep(0.2) or 1 / 0)\n"
        "thread.start()\ntry:\n    ctrl_c()\nfinally:\n    thread.join()",
        "import logging\ntry:\n    ctrl_c()\nfinally:\n    logging.error('not written')",
    ],
)
def test_ctrl_c_is_one_line_and_status_130(body, tmp_path):
    (tmp_path / "imported.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n"
        "    os.abort()\n"
    )
    done = script(body, tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("word", ["--help", "--helpfull"])
def test_help_is_no_error(word, tmp_path):
    done = script("pass", tmp_path, word)
    assert (done.returncode, done.stderr) == (0, "") and "doc" in done.stdout


def test_a_config_that_ends_the_process_is_no_help(tmp_path):
    (tmp_path / "c.py").write_text("import sys\nsys.exit(3)\n")
    command = [sys.executable, str(REPOSITORY / "scripts/quantize.py"), "--config=c.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode == 3


def test_ctrl_c_after_everything_changes_nothing(tmp_path):
    last = "class Last:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 2)\n"
    body = f"global last\n{last}last = Last()"
    done = script(body, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_before_the_job_is_one_line_too(tmp_path):
    path = tmp_path / "script.py"
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import gptvq_jax.console.cli"
    path.write_text(f"{code}\nraise KeyboardInterrupt\n")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_what_ends_with_an_error(tmp_path):
    done = script("raise OSError('two\\n lines')", tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: two lines\n")
    done = script("raise KeyError('a bug')", tmp_path)
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'a bug'\n")
    done = script("raise ValueError('no')", tmp_path, "--verbosity=1")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_an_argument_that_is_no_flag_is_one_line(tmp_path):
    done = script("pass", tmp_path, "smollm2")
    line = "error: unexpected argument 'smollm2'; flags look like --name=value, and --help lists"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{line} them\n")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_ends_it_quietly(lines, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = script(f"for i in range({lines}): print(i)", tmp_path, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = script("print('text')", tmp_path, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_no_output_at_all(tmp_path):
    line = ["sh", "-c", f'"{sys.executable}" "$0" >&-', str(tmp_path / "script.py")]
    script("print('text')", tmp_path)
    assert subprocess.run(line, capture_output=True, text=True).returncode == 0


def test_what_the_terminal_cannot_show_is_replaced(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = script("print('a \\u2192 \\U0001f98a \\udcff')", tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a ? ? ?\n", "")
    done = script("raise ValueError('\\u2192')", tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (1, "error: ?\n")


@pytest.fixture
def given(monkeypatch):
    """Flags of a script, parsed from a command line."""
    values = flags.FlagValues()
    flags.DEFINE_integer("top_k", 0, "", flag_values=values)
    flags.DEFINE_string("name", None, "", flag_values=values)
    flags.DEFINE_string("system", None, "", flag_values=values)
    flags.DEFINE_list("batches", ["1"], "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    return lambda *words: values(["script", *words])


def test_a_flag_without_effect_is_refused_only_where_it_is_given(given):
    given()
    cli.refuse(["top_k"], "here; set x")
    given("--top_k=0")  # the default, but somebody means it
    with pytest.raises(ValueError, match="--top_k has no effect here; set x"):
        cli.refuse(["name", "top_k"], "here; set x")


@pytest.mark.parametrize("word", ["--name=", "--batches="])
def test_an_empty_flag_is_refused(given, word):
    given(word)
    with pytest.raises(ValueError, match=f"{word} is empty; give it a value or leave it out"):
        cli._refuse_empty_flags()


def test_a_text_may_be_empty(given):
    given("--system=")
    cli._refuse_empty_flags()


@pytest.mark.parametrize(
    "words, text",
    [
        (["scripts/a.py", "--name=a b"], "python scripts/a.py '--name=a b'"),
        (["gptvq_jax quantize", "--config=x:2b"], "gptvq_jax quantize --config=x:2b"),
    ],
)
def test_the_command_as_it_was_typed(words, text, monkeypatch):
    monkeypatch.setattr(sys, "argv", words)
    assert cli.command_line() == text


@pytest.mark.parametrize("word", ["--batches=1,x", "--batches=0", "--batches=1.5"])
def test_integers_of_a_list_flag(given, word):
    given("--batches=1,16")
    assert cli.integers("batches") == [1, 16]
    given(word)
    with pytest.raises(ValueError, match=rf"{word} must be integers of at least 1"):
        cli.integers("batches")
