"""The table of a token's time by part, and of llama.cpp's speed beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from gptvq_jax.study.token_times import REST, bound

_HEADER = (
    "part                      calls        us   quartiles      share      MB    GB/s    "
    "M mult.-adds   bound us  x bound"
)


def table(models: Sequence[Mapping[str, Any]], copy_bandwidth: float, multiply_rate: float) -> str:
    """Text, one block for each model; parts within the part above them are indented, and not in
    the sum.

    Args:
      models: "name", "context", "batch", and what `token_times.measure` says of it.
      copy_bandwidth, multiply_rate: as of `token_times.bound`.
    """
    lines = []
    for model in models:
        seconds, batch = model["seconds"], model["batch"]
        low, high = (1e3 * value for value in model["quartiles"])
        lines += [
            "",
            f"{model['name']}, batch {batch}, {model['context']} tokens before: "
            f"{1e3 * seconds:.2f} ms a step ({low:.2f} to {high:.2f}), "
            f"{batch / seconds:.1f} tokens/s",
            _HEADER,
        ]
        for row in model["rows"]:
            lines.append(_line(row, seconds, bound(row, copy_bandwidth, multiply_rate)))
        parts = [row for row in model["rows"] if row["part"] != REST and not row["within"]]
        whole = {
            "part": "a step",
            "within": False,
            "calls": sum(row["calls"] for row in parts),
            "seconds": seconds,
            "quartiles": model["quartiles"],
            "bytes": sum(row["bytes"] for row in parts),
            "multiply_adds": sum(row["multiply_adds"] for row in parts),
        }
        least = sum(bound(row, copy_bandwidth, multiply_rate) for row in parts)
        lines.append(_line(whole, seconds, least))
    return "\n".join(lines[1:])


def _line(row: Mapping[str, Any], whole: float, least: float) -> str:
    low, high = (1e6 * value for value in row["quartiles"])
    seconds, size, work = row["seconds"], row["bytes"], row["multiply_adds"]
    name = "  " * row["within"] + row["part"]
    start = (
        f"{name:25s} {row['calls'] if row['part'] != REST else '-':>5}  "
        f"{1e6 * seconds:8.0f} {f'{low:.0f} to {high:.0f}':>15s}  {seconds / whole:6.1%}"
    )
    if row["part"] == REST:
        return start
    speed = f"{size / seconds / 1e9:6.1f}" if seconds > 0 else "     -"
    times = f"{seconds / least:7.1f}" if least and seconds > 0 else "      -"
    return (
        f"{start}  {size / 1e6:6.2f}  {speed}   {f'{work / 1e6:.2f}' if work else '-':>13s}   "
        f"{1e6 * least:8.1f}  {times}"
    )


def speeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Text: tokens per second of every contender that generated the same number of tokens in turn.

    Args:
      rows: "name", "tokens_per_second" (median), "quartiles", "bytes" (of the weights), in order.
    """
    lines = ["", "in turn            tokens/s   quartiles          MiB of weights"]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"{row['name']:18s} {row['tokens_per_second']:8.1f}   {f'{low:.1f} to {high:.1f}':16s}"
            f" {row['bytes'] / 2**20:16.1f}"
        )
    return "\n".join(lines)
