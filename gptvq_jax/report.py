"""What a run tells its user: the table per layer, the summary, the picture."""

from pathlib import Path
from typing import Any

import numpy as np

_COLUMNS = "block  layer              rel. error   SQNR dB   bits/value   seconds"


def layer_table(rows: list[dict[str, Any]]) -> str:
    """One line per layer: relative output error, SQNR, true bits per value, seconds."""
    lines = [_COLUMNS]
    for row in rows:
        sqnr = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
        lines.append(
            f"{row['block']:5d}  {row['layer']:<17s} {row['relative_error']:11.5f} {sqnr:>9s} "
            f"{row['bits_per_value']:12.4f} {row['seconds']:9.2f}"
        )
    return "\n".join(lines)


def summary_text(summary: dict[str, Any]) -> str:
    """The last lines of a run."""
    before, after = summary["perplexity_float"], summary["perplexity_quantized"]
    mib = 1 / 2**20
    embedding_bytes = summary["embedding_bytes"]
    embeddings = f"int8 embeddings {embedding_bytes * mib:.1f} MiB, " if embedding_bytes else ""
    lines = [
        ("bits per value", f"{summary['bits_per_value']:.4f}  (codes, codebooks and scales of "
         f"{summary['num_layers']} layers)"),
        ("bytes on disk", f"{summary['checkpoint_bytes'] * mib:.1f} MiB, of which quantized layers "
         f"{summary['quantized_bytes'] * mib:.1f} MiB, {embeddings}dense leaves "
         f"{summary['dense_bytes'] * mib:.1f} MiB"),
        ("perplexity", f"float {before:.3f} -> quantized {after:.3f}  "
         f"(log-perplexity {np.log(after / before):+.4f}; {summary['evaluation']})"),
        ("calibration", summary["calibration"]),
        ("time", f"{summary['seconds']:.0f} s, of which compilation "
         f"{summary['compile_seconds']:.0f} s"),
        ("stages", ", ".join(f"{k} {v:.0f} s" for k, v in summary["stages"].items())),
        ("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]  # fmt: skip
    return "\n".join(f"{name:>15s}  {text}" for name, text in lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Relative output error against depth, one line per kind of layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name in dict.fromkeys(row["layer"] for row in rows):
        of_layer = [row for row in rows if row["layer"] == name]
        blocks = [row["block"] for row in of_layer]
        axes.plot(blocks, [row["relative_error"] for row in of_layer], ".-", label=name)
    axes.set(yscale="log", xlabel="block", ylabel="relative output error", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def time_table(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Seconds by stage and by kind of layer, with their share of the whole run."""
    total = summary["seconds"]
    by_layer: dict[str, float] = {}
    for row in rows:
        by_layer[row["layer"]] = by_layer.get(row["layer"], 0.0) + row["seconds"]
    parts = [*summary["stages"].items(), ("elsewhere", total - sum(summary["stages"].values()))]
    lines = [f"{'stage':24s} seconds   share"]
    lines += [f"{name:24s} {s:7.1f}  {s / total:6.1%}" for name, s in parts]
    lines += [
        f"{'  quantize ' + name:24s} {s:7.1f}  {s / total:6.1%}" for name, s in by_layer.items()
    ]
    compiling = summary["compile_seconds"]
    lines.append(f"{'compilation, in these':24s} {compiling:7.1f}  {compiling / total:6.1%}")
    lines.append(f"{'total':24s} {total:7.1f}")
    return "\n".join(lines)
