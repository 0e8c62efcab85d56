"""What a sweep shows meanwhile: a line for every cell.

On a terminal the lines stay where they are and change; in a log a line is added for each change.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from gptvq_jax.study.sweep.results import DONE, FAILED

# Of each kind of sweep: what is told of a cell beside its bits.
MEASURES = {"models": ("perplexity_quantized", "perplexity"), "layers": ("sqnr_db", "SQNR dB")}
_WAITING, _ELSEWHERE = "waiting", "elsewhere"


class Table:
    """The cells of a sweep and how far they are.

    Args:
      kind: of the sweep.
      names: of the cells that are wanted.
      terminal: whether lines may change; default: whether this process has a terminal.
    """

    def __init__(self, kind: str, names: Sequence[str], terminal: bool | None = None):
        self._field, self._title = MEASURES[kind]
        self._width = max(4, *map(len, names))
        self._lines = {name: self._line(name, _WAITING) for name in names}
        self._ended: set[str] = set()
        if terminal is None:
            terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self._bars: dict[str, tqdm] = {}
        if terminal:
            self._say(self.header)
            for name, line in self._lines.items():
                self._bars[name] = tqdm(total=0, bar_format="{desc}", desc=line, leave=False)
        else:
            self._say(self.header)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for bar in self._bars.values():
            bar.close()

    @property
    def header(self) -> str:
        return f"{'cell':{self._width}s}  state       bits/value {self._title:>12s}    seconds"

    def started(self, name: str, what: str) -> None:
        """Says that this process makes a cell, or what it needs."""
        self._change(name, self._line(name, what))

    def elsewhere(self, name: str) -> None:
        """Says that another process makes a cell, or what it needs."""
        self._change(name, self._line(name, _ELSEWHERE))

    def ended(self, name: str, row: Mapping[str, Any]) -> bool:
        """Shows the row of a cell; False where that was shown before."""
        new = name not in self._ended
        self._ended.add(name)
        self._change(name, self._result(name, row))
        return new

    def text(self) -> str:
        """The whole of it."""
        return "\n".join([self.header, *self._lines.values()])

    def _result(self, name: str, row: Mapping[str, Any]) -> str:
        if row["status"] == FAILED:
            return f"{name:{self._width}s}  {FAILED}      {row['error']}"
        bits, value = float(row["bits_per_value"]), float(row[self._field])
        return self._line(name, DONE, f"{bits:10.4f} {value:12.3f} {float(row['seconds']):10.1f}")

    def _line(self, name: str, state: str, numbers: str = "") -> str:
        return f"{name:{self._width}s}  {state:10s}  {numbers}".rstrip()

    def _change(self, name: str, line: str) -> None:
        if self._lines[name] == line:
            return
        self._lines[name] = line
        if not self._bars:
            self._say(line)
            return
        self._bars[name].set_description_str(line, refresh=False)
        for bar in self._bars.values():  # a bar that ended may have written over them
            bar.refresh()

    @staticmethod
    def _say(line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
