"""The commands that README, docs and docstrings print, and how to run a script in this process."""

import ast
import contextlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from absl import flags

from gptvq_jax.__main__ import COMMANDS, script
from gptvq_jax.console import cli

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"


def shell_commands(markdown: str) -> list[str]:
    """Commands of the bash blocks, one a line, as the shell has them after comments are gone."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", markdown, re.S | re.M):
        joined = block.replace("&&\n", "&& ").replace("\\\n", " ")
        for line in joined.splitlines():
            words = [*shlex.split(line, comments=True), "&&"]
            while "&&" in words:
                end = words.index("&&")
                found += [shlex.join(words[:end])] if end else []
                words = words[end + 1 :]
    return found


def python_blocks(markdown: str) -> list[str]:
    """The code of the python blocks."""
    return re.findall(r"^```python\n(.*?)^```", markdown, re.S | re.M)


def inline_commands(text: str) -> list[str]:
    """`python scripts/...` and `gptvq_jax COMMAND --...` in the running text."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    spans = re.findall(r"`(python scripts/[^`]*|gptvq_jax [\w-]+ --[^`]*)`", prose)
    return [" ".join(span.split()) for span in spans if "..." not in span]


def docstring_commands(path: Path) -> list[str]:
    """Indented commands in the docstring of a file."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    lines = [line.strip() for line in doc.splitlines() if "python scripts/" in line]
    return [line for line in lines if line.startswith("python scripts/")]


@contextlib.contextmanager
def parsed(command: str, monkeypatch) -> Iterator[ModuleType]:
    """The module of a script, with the flags of a command; they are gone when the context ends.

    Exits, as the script would, where a flag is wrong.
    """
    words = shlex.split(command, comments=True)
    if words[0] == "gptvq_jax":
        assert words[1] in COMMANDS, command
        words[:2] = ["python", str(script(words[1]).relative_to(REPOSITORY))]
    assert words.pop(0) == "python" and re.fullmatch(r"scripts/\w+\.py", words[0]), command
    monkeypatch.setattr(sys, "argv", words)
    known = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location("script", REPOSITORY / words[0])
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        assert cli._parse_flags(words)[1:] == []
        cli._refuse_empty_flags()
        yield module
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
