"""A device in ten minutes: what scripts/check_device.py runs, one section after the other.

Each section is a process of its own (check_device_sections.py), so that one that fails, hangs or is
killed for memory stops no other; and a device that one process holds is free for the next. The
report is written after each, and keeps the sections of an earlier one on the same device that are
not run again.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptvq_jax.console.errors import first_line
from gptvq_jax.console.json_file import read_json_object
from gptvq_jax.console.progress import Progress
from gptvq_jax.files.durable import write_text

DEVICE = "device"
# Parts of the time. The device comes first: what follows is judged by its rates.
SHARES = {
    DEVICE: 0.06,
    "kernels": 0.2,
    "decode": 0.17,
    "block_7b": 0.17,
    "block_70b": 0.17,
    "smoke": 0.23,
}
OK, FAILED = "ok", "failed"
Report = dict[str, Any]


def chosen_sections(names: Sequence[str]) -> list[str]:
    """Those named, in their order, and the device, without which the others say little.

    Raises:
      ValueError: there is no such section.
    """
    for name in names:
        if name not in SHARES:
            raise ValueError(f"--sections: {name!r} is none of {', '.join(SHARES)}")
    return [name for name in SHARES if name in names or name == DEVICE]


def check(
    sections: Sequence[str],
    minutes: float,
    output: Path,
    run: Callable[[str, float], dict[str, Any]],
    version: str = "",
) -> Report:
    """Runs sections and writes the report; each has its share of the time, and no more.

    Args:
      sections: of `chosen_sections`.
      minutes: for all of SHARES together.
      output: file of the report.
      run: name and seconds of a section -> what it found, or an exception.
      version: of this package.

    Returns:
      {"version", "device": what that section found, "sections": {name: {"status", "found" or
      "reason"}}}.
    """
    before, report = _earlier(output), {"version": version, "device": None, "sections": {}}
    with Progress(len(sections), "check device", "section") as progress:
        for name in sections:
            progress.note(name)
            try:
                row = {"status": OK, "found": run(name, 60 * minutes * SHARES[name])}
            except Exception as error:  # noqa: BLE001 - whatever it was, the others go on
                row = {"status": FAILED, "reason": first_line(error)}
            report["sections"][name] = row
            if name == DEVICE:
                report["device"] = row.get("found")
            write_text(output, json.dumps(_with_earlier(report, before), indent=1) + "\n")
            progress.advance(name)
    return _with_earlier(report, before)


def failed(report: Report) -> list[str]:
    """Names of sections that failed."""
    return [n for n, row in report["sections"].items() if row["status"] == FAILED]


def _earlier(output: Path) -> Report:
    if not output.is_file():
        return {}
    found = read_json_object(output)
    if not isinstance(found.get("sections"), dict):
        raise ValueError(f"{output} is no report of this script; name another with --output")
    return found


def _with_earlier(report: Report, before: Report) -> Report:
    """The report with sections of an earlier one of the same version on the same device."""

    def same(of: Report) -> Any:
        return of.get("version"), (of.get("device") or {}).get("name")

    if not before.get("device") or same(report) != same(before):
        return report
    sections = {**before["sections"], **report["sections"]}
    return {**report, "sections": {name: sections[name] for name in SHARES if name in sections}}


def in_process(command: Sequence[str], seconds: float, result: Path) -> dict[str, Any]:
    """Runs a section by a command that writes what it found, or why it failed, to a file.

    Raises:
      ValueError: it failed, was killed, or took longer than it may.
    """
    try:
        done = subprocess.run(command, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(f"took longer than {seconds:.0f} s; give more with --minutes") from None
    if not result.is_file():
        raise ValueError(f"ended with status {done.returncode} (-9: out of memory)")
    found = json.loads(result.read_text())
    if "error" in found:
        raise ValueError(found["error"])
    return found
