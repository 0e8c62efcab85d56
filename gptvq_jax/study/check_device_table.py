"""The report of scripts/check_device.py as a table for a README."""

from collections.abc import Iterator
from typing import Any

from gptvq_jax.study.check_device import FAILED

Row = tuple[str, str]


def table(report: dict[str, Any]) -> str:
    """Markdown, a line for each thing that was measured."""
    lines = ["| check | found |", "| --- | --- |"]
    for name, row in report["sections"].items():
        if row["status"] == FAILED:
            found = [(name, f"FAILED: {row['reason']}")]
        else:
            found = list(_ROWS.get(name, _block)(row["found"]))
        lines += [f"| {what} | {text.replace('|', '/')} |" for what, text in found]
    return "\n".join(lines)


def _device(found: dict[str, Any]) -> Iterator[Row]:
    count = f"{found['devices']} x " if found["devices"] > 1 else ""
    memory = f"{found['memory_gigabytes']:.1f} GB"
    yield "device", f"{count}{found['name']}, {found['platform']}, {memory}, JAX {found['jax']}"
    rates = (
        f"float32 {found['float32_tflops']:.3g} TFLOP/s, bfloat16 {found['bfloat16_tflops']:.3g}"
    )
    yield "large products", f"{rates} TFLOP/s"
    yield "a copy moves", f"{found['copy_gigabytes']:.0f} GB/s"


def _kernels(found: dict[str, Any]) -> Iterator[Row]:
    rows = found["rows"]
    for implementation in dict.fromkeys(row["implementation"] for row in rows):
        own = [row for row in rows if row["implementation"] == implementation]
        worst = max(own, key=lambda row: row["error"] / row["most"])
        text = f"{len(own)} products agree with float64, the worst to {worst['error']:.1e} "
        yield f"kernel {implementation}", f"{text}({worst['name']}, {worst['dtype']})"
    yield from _left(found, "kernels")


def _decode(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        what = f"{row['rows']} x {row['cols']}, {row['name']} {row['implementation']}".strip()
        if "skipped" in row:
            yield what, f"not measured: {row['skipped']}"
            continue
        ratio = row["to_float32"]
        against = "" if ratio is None else f", {1 / ratio:.2f} times as fast as float32"
        yield what, f"{1e6 * row['seconds']:.0f} us at {row['bits_per_value']:.3f} bits{against}"
    yield from _left(found, "decode")


def _left(found: dict[str, Any], section: str) -> Iterator[Row]:
    if found["not_in_time"]:
        yield f"{section} not in time", ", ".join(map(str, found["not_in_time"]))


def _block(found: dict[str, Any]) -> Iterator[Row]:
    scale = "true shapes"
    if found["divided_by"] > 1:
        scale = f"widths divided by {found['divided_by']}, for memory and time"
    parts = ", ".join(f"{move} {seconds:.1f} s" for move, seconds in found["seconds"].items())
    yield f"a block of {found['like']} ({scale})", parts
    yield from _left(found, f"layers of {found['like']}")


def _smoke(found: dict[str, Any]) -> Iterator[Row]:
    perplexity = f"{found['perplexity_float']:.2f} -> {found['perplexity_quantized']:.2f}"
    text = f"{found['seconds']:.0f} s, perplexity {perplexity} at {found['bits_per_value']:.3f} "
    text += f"bits, peak memory of the host {found['peak_memory_gigabytes']:.1f} GB"
    yield "SmolLM2-135M, two blocks", text


_ROWS = {"device": _device, "kernels": _kernels, "decode": _decode, "smoke": _smoke}
