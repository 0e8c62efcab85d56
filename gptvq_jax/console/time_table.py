"""The table of where the time of a run goes, by stage and kind of layer; of one run or of two."""

from collections.abc import Sequence
from typing import Any

from gptvq_jax.console.stopwatch import stages_of, totals_of

Rows = Sequence[dict[str, Any]]  # of a work directory's metrics.jsonl, the summary last
_HEAD = (
    f"{'stage':<20s}{'seconds':>9s}{'share':>7s}{'TFLOP':>9s}{'TFLOP/s':>9s}{'of rate':>9s}"
    f"{'cores':>7s}{'compile':>9s}{'read GB':>9s}{'wrote GB':>10s}"
)


def time_table(
    run: Rows, against: Rows | None = None, rate: float | None = None, processor: str = ""
) -> str:
    """One line for each stage, for each kind of layer, and for the whole; "-" is not measured.

    Args:
      run: rows of a finished run.
      against: those of another, which may be of older code. Each line is then followed by that of
        the other run, where the share gives way to the ratio of seconds, run / other.
      rate: FLOP/s of matrix products on `processor`, or None. Of a run that was made on another
        processor, no part of it is shown.
      processor: as a summary names it.
    """
    runs = [run] if against is None else [run, against]
    lines = [_parts(rows) for rows in runs]
    rates = [rate if rows[-1].get("processor") == processor else None for rows in runs]
    names = list(dict.fromkeys(name for of_run in lines for name in of_run))
    names.sort(key=_place)  # of stages that only one run has, those of the other come first
    table = [_HEAD]
    for name in names:
        parts = [of_run.get(name, {}) for of_run in lines]
        wholes = [of_run[_TOTAL]["seconds"] for of_run in lines]
        table.append(_line(name, parts[0], _percent(parts[0].get("seconds"), wholes[0]), rates[0]))
        if against is not None:
            ratio = _ratio(*(part.get("seconds") for part in parts))
            share = "-" if ratio is None else f"{ratio:.2f}x"
            table.append(_line("  against", parts[1], share, rates[1]))
    return "\n".join(table)


_TOTAL = "total"


def _parts(rows: Rows) -> dict[str, dict[str, Any]]:
    """{line: what is known of it}, in the order of the table."""
    summary = rows[-1]
    stages = stages_of(summary)
    first = summary.get("resumed_at") or 0  # blocks before it took their time in another process
    by_layer: dict[str, float] = {}
    for row in rows[:-1]:
        # The tuning of a block is a stage of its own.
        if row["kind"] == "layer" and row["block"] >= first:
            by_layer[row["layer"]] = by_layer.get(row["layer"], 0.0) + row["seconds"]
    totals = totals_of(summary)
    if "elsewhere" not in stages:  # of older code, whose stages did not overlap
        inside = sum(row["seconds"] for row in stages.values())
        stages["elsewhere"] = {"seconds": max(0.0, totals["seconds"] - inside)}
    layers = {f"  {name}": {"seconds": seconds} for name, seconds in by_layer.items()}
    return {**stages, **layers, _TOTAL: totals}


def _place(name: str) -> int:
    """Stages, what is in none of them, kinds of layers, the whole."""
    if name == _TOTAL:
        return 3
    return 2 if name.startswith(" ") else int(name == "elsewhere")


def _line(name: str, part: dict[str, Any], share: str, rate: float | None) -> str:
    seconds, tflop = part.get("seconds"), part.get("tflop")
    speed = _ratio(tflop, seconds)
    gigabytes = [_ratio(part.get(f"bytes_{way}"), 1e9) for way in ("read", "written")]
    return (
        f"{name:<20s}{_number(seconds, '.1f'):>9s}{share:>7s}{_number(tflop):>9s}"
        f"{_number(speed):>9s}{_percent(speed, rate and rate / 1e12):>9s}"
        f"{_number(_ratio(part.get('cpu_seconds'), seconds), '.2f'):>7s}"
        f"{_number(part.get('compile_seconds'), '.1f'):>9s}"
        f"{_number(gigabytes[0], '.2f'):>9s}{_number(gigabytes[1], '.2f'):>10s}"
    )


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def _percent(value: float | None, of: float | None) -> str:
    part = _ratio(value, of)
    return "-" if part is None else f"{part:.1%}"
