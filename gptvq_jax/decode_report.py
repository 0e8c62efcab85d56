"""The table and the plot of scripts/benchmark_decode.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HEADER = (
    "weight      implementation  bits      MB        us   quartiles        GB/s  of copy  "
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
            start = f"{row['name']:11s} {row['implementation']:13s}"
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
    """Time of one product against bits per value, one panel for each shape and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = _groups([row for row in rows if "skipped" not in row])
    figure, all_axes = plt.subplots(
        len(groups), 1, figsize=(8, 4 * len(groups)), layout="constrained", squeeze=False
    )
    for axes, ((shape_rows, cols, batch), group) in zip(
        all_axes[:, 0], groups.items(), strict=True
    ):
        by_kind: dict[str, list] = {}
        for row in group:
            kind = row["implementation"] or row["name"]
            by_kind.setdefault(kind, []).append(row)
        for kind, members in by_kind.items():
            members = sorted(members, key=lambda row: row["bits_per_value"])
            micros = [1e6 * row["seconds"] for row in members]
            spread = [
                [m - 1e6 * row["quartiles"][0] for m, row in zip(micros, members, strict=True)],
                [1e6 * row["quartiles"][1] - m for m, row in zip(micros, members, strict=True)],
            ]
            bits = [row["bits_per_value"] for row in members]
            axes.errorbar(bits, micros, spread, fmt="o", capsize=2, label=kind)
            for row, x, y in zip(members, bits, micros, strict=True):
                if row["implementation"]:
                    axes.annotate(
                        row["name"], (x, y), (4, 3), textcoords="offset points", fontsize=7
                    )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="bits per value",
            ylabel="microseconds",
            title=f"{shape_rows} x {cols}, batch {batch}, {device}",
        )
        axes.set_xticks([2, 3, 4, 8, 16, 32], [2, 3, 4, 8, 16, 32], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int, int], list[dict[str, Any]]]:
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["rows"], row["cols"], row["batch"]), []).append(row)
    return groups


def _ratio(value: float | None, width: int = 9) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.3f}"
