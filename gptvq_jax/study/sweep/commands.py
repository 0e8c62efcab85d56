"""The command that makes one cell alone."""

import shlex
from collections.abc import Collection
from typing import Any

from gptvq_jax.config import flat, to_dict
from gptvq_jax.console.config_file import load_config, printed_config
from gptvq_jax.run.overrides import ignored
from gptvq_jax.study.sweep.cells import Cell, Sweep


def command(sweep: Sweep, cell: Cell, origin: str, given: Collection[str] = ()) -> str:
    """For a shell: a run of scripts/quantize.py, or a part of the sweep where there is none.

    Args:
      sweep: of the cell.
      cell: of the sweep.
      origin: the config file of the sweep, with its argument.
      given: fields of it that the command line named, such as "base.model".
    """
    if sweep.kind == "layers" or not cell.source:
        base = flat(sweep.base.to_dict())
        flags = [(field, base[field.removeprefix("base.")]) for field in given]
        words = [f"--config.{field}={_text(value)}" for field, value in flags]
        cells = f"--cells=^{cell.name}$".replace("+", r"\+").replace(".", r"\.")
        return _line("sweep", origin, [*words, cells])
    shipped, reasons = flat(load_config(cell.source).to_dict()), ignored(cell.settings)
    words = [
        f"--config.{field}={_text(value)}"
        for field, value in flat(to_dict(cell.settings)).items()
        if field not in reasons and _differ(value, shipped[field])
    ]
    return _line("quantize", cell.source, [*words, f"--workdir=runs/{sweep.name}_{cell.name}"])


def _line(script: str, config: str, words: list[str]) -> str:
    words = [f"--config={printed_config(config)}", *words]
    return shlex.join(["python", f"scripts/{script}.py", *words])


def _differ(value: Any, other: Any) -> bool:
    return tuple(value) != tuple(other) if isinstance(value, tuple | list) else value != other


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({','.join(map(repr, value))}{',' * (len(value) == 1)})"
    return str(value)
