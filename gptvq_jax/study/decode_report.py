"""The table and the plot of scripts/benchmark_decode.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HEADER = (
    "weight         implementation  bits      MB        us   quartiles        GB/s  of copy  "
    "x float32  x int4"
)


def table(rows: Sequence[dict[str, Any]], copy_bandwidth: float) -> str:
    """Text, one block for each shape and batch.

    Args:
      rows: of `decode_benchmark.measure`.
      copy_bandwidth: bytes per second, read and written, of a copy.
    """
    lines = []
    for (shape_rows, cols, batch), group in _groups(rows).items():
        lines += ["", f"{shape_rows} x {cols}, batch {batch}", _HEADER]
        for row in group:
            start = f"{row['name']:14s} {row['implementation']:13s}"
            if "skipped" in row:
                lines.append(f"{start} not measured: {row['skipped']}")
                continue
            low, high = (1e6 * value for value in row["quartiles"])
            speed = row["gigabytes_per_second"]
            lines.append(
                f"{start} {row['bits_per_value']:6.3f} {row['bytes'] / 1e6:7.1f} "
                f"{1e6 * row['seconds']:9.1f}   {f'{low:.0f}-{high:.0f}':>11s}  {speed:8.1f}  "
                f"{1e9 * speed / copy_bandwidth:6.0%}  {_ratio(row['to_float32'])}  "
                f"{_ratio(row['to_int4'], 6)}"
            )
    return "\n".join(lines[1:])


def plot(rows: Sequence[dict[str, Any]], device: str, path: Path) -> None:
    """Bars of the time of one product, with quartiles, one panel for each shape and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = _groups([row for row in rows if "skipped" not in row])
    tallest = max(len(group) for group in groups.values())
    figure, all_axes = plt.subplots(
        1,
        len(groups),
        figsize=(1 + 5.5 * len(groups), 1.2 + 0.22 * tallest),
        layout="constrained",
        squeeze=False,
    )
    kinds = list(dict.fromkeys(_kind(row) for group in groups.values() for row in group))
    for axes, ((shape_rows, cols, batch), group) in zip(all_axes[0], groups.items(), strict=True):
        for place, row in enumerate(group):
            micros = 1e6 * row["seconds"]
            low, high = (1e6 * value for value in row["quartiles"])
            axes.barh(
                place,
                micros,
                xerr=[[micros - low], [high - micros]],
                color=f"C{kinds.index(_kind(row))}",
                error_kw={"linewidth": 0.8},
            )
        names = [f"{row['name']} {row['implementation']}".strip() for row in group]
        bits = [row["bits_per_value"] for row in group]
        labels = [f"{name}, {b:.2f} bits" for name, b in zip(names, bits, strict=True)]
        axes.set_yticks(range(len(group)), labels, fontsize=7)
        axes.invert_yaxis()
        # What is slower than the first, a dense weight, is cut: its number says how far it goes.
        limit = 1.15e6 * group[0]["quartiles"][1]
        for place, row in enumerate(group):
            micros = 1e6 * row["seconds"]
            axes.text(
                min(micros + 0.02 * limit, 0.9 * limit), place + 0.15, f"{micros:.0f}", size=7
            )
        axes.set(
            xlim=(0, limit),
            xlabel="microseconds",
            title=f"{shape_rows} x {cols}, batch {batch}, {device}",
        )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _kind(row: dict[str, Any]) -> str:
    """What has a colour of its own."""
    return row["implementation"] or row["name"]


def _groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int, int], list[dict[str, Any]]]:
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["rows"], row["cols"], row["batch"]), []).append(row)
    return groups


def _ratio(value: float | None, width: int = 9) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.3f}"
