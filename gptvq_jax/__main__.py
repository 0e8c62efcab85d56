"""The console command: every script by one door, `gptvq_jax quantize ...`.

A command is a file of scripts/, run as Python runs it: with its flags, its exit status and its
Ctrl-C. Where its docstring says `python scripts/quantize.py --config=configs/NAME.py`, the help
says `gptvq_jax quantize --config=NAME`. Without an installation, `python -m gptvq_jax` is the same.
"""

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

import ast
import re
import sys
import textwrap
import types
from pathlib import Path

from gptvq_jax import __doc__ as TITLE
from gptvq_jax import __version__
from gptvq_jax.console.config_file import config_names
from gptvq_jax.console.nearest_name import nearest_name
from gptvq_jax.console.shipped import shipped

PROGRAM = "gptvq_jax"
# In the order in which one needs them.
GROUPS = {
    "To quantize a model and use it": (
        "quantize",
        "calibrate",
        "finetune",
        "lora",
        "evaluate",
        "evaluate-tasks",
        "generate",
        "chat",
        "serve",
        "export",
        "import",
    ),
    "To see what it costs and what each choice is worth": (
        "plan",
        "check-device",
        "report",
        "benchmark-pipeline",
        "sweep",
        "ablate",
        "benchmark-layers",
        "benchmark-big-layer",
        "benchmark-memory",
        "benchmark-loading",
        "benchmark-decode",
        "benchmark-serving",
        "make-synthetic",
        "torture",
    ),
}
_HELP = ("help", "--help", "-help", "-h", "-?")
COMMANDS = tuple(command for group in GROUPS.values() for command in group)


def main() -> int:
    """Runs the command that sys.argv names; returns or exits with its status."""
    command, *words = sys.argv[1:] or [""]
    if command in _HELP and words:  # help quantize
        command, words = words[0], [*words[1:], "--help"]
    if command in COMMANDS:
        run(command, words)
        return 0
    if command in ("", *_HELP):
        cli.show(overview())
        return 0 if command else 1
    if command == "--version":
        cli.show(f"{PROGRAM} {__version__}")
        return 0
    cli.print_error(unknown(command))
    return 1


def run(command: str, words: list[str]) -> None:
    """Runs a script as `__main__`, under the name of its command; exits as the script does."""
    path = script(command)
    tree = ast.parse(path.read_bytes())
    tree.body[0].value.value = as_commands(ast.get_docstring(tree, clean=False))
    sys.argv = [f"{PROGRAM} {command}", *words]
    module = types.ModuleType("__main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module  # where absl and multiprocessing look for it
    exec(compile(tree, path, "exec"), module.__dict__)


def script(command: str) -> Path:
    """The file of a command."""
    return shipped("scripts") / f"{command.replace('-', '_')}.py"


def as_commands(text: str) -> str:
    """A text that names scripts and config files, with commands and names of configs instead."""
    text = re.sub(
        r"(?:python )?scripts/(\w+)\.py", lambda m: f"{PROGRAM} {m[1].replace('_', '-')}", text
    )
    return re.sub(r"configs/([\w/]+)\.py", r"\1", text)


def overview() -> str:
    """What each command is for, with the first example of its docstring."""
    lines = [
        TITLE.splitlines()[0],
        "",
        f"  {PROGRAM} COMMAND [--flag=value ...]",
        f"  {PROGRAM} COMMAND --help     # what it does, with its flags and more examples",
    ]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        for command in commands:
            purpose, example = purpose_and_example(command)
            lines += [f"  {command:21s}{purpose}", f"{'':23s}{example}"]
    names = textwrap.fill(", ".join(config_names()), 96)
    return "\n".join(
        [
            *lines,
            "",
            "--config takes a file, or one of these by its name; after a colon comes its argument,",
            "as in smollm2_135m_2d:2b (a wrong one lists all that there are):",
            textwrap.indent(names, "  "),
        ]
    )


def purpose_and_example(command: str) -> tuple[str, str]:
    """The first line of a script's docstring, and its first example."""
    text = ast.get_docstring(ast.parse(script(command).read_bytes()))
    purpose, *rest = as_commands(text).splitlines()
    examples = [line.strip() for line in rest if line.strip().startswith(f"{PROGRAM} {command}")]
    return purpose, examples[0].partition("  #")[0].strip()


def unknown(command: str) -> str:
    """What is wrong with a first word that is no command."""
    lists = f"{PROGRAM} --help lists all"
    if command.startswith("-"):
        return f"{command} comes before a command; write {PROGRAM} COMMAND {command}; {lists}"
    near = nearest_name(Path(command).stem.replace("_", "-"), COMMANDS)
    meant = f"; the nearest is {near!r}" if near else ""
    return f"there is no command {command!r}{meant}; {lists}"


if __name__ == "__main__":
    sys.exit(main())
