"""A plan as text."""

from typing import Any

from tqdm import tqdm

_HOUR = 3600


def plan_text(plan: dict[str, Any]) -> str:
    """What plan.make_plan found."""
    parts = [_head(plan), _time(plan), _memory(plan), _disk(plan), _assumptions(plan)]
    return "\n\n".join(parts)


def _head(plan: dict[str, Any]) -> str:
    return (
        f"plan of {plan['config']}: {plan['model']}, {plan['blocks']} blocks\n"
        f"on {plan['device']}; time: {plan['basis']}"
    )


def _time(plan: dict[str, Any]) -> str:
    head = f"{'stage':<18s}{'TFLOP':>12s}{'files GB':>11s}{'launches':>12s}"
    lines = [f"{head}{'seconds':>11s}{'share':>7s}"]
    for stage in plan["stages"]:
        launched = stage["launches"]
        lines.append(
            f"{stage['name']:<18s}{_or_dash(stage['flop'] / 1e12, ',.3f'):>12s}"
            f"{_or_dash(stage['num_bytes'] / 1e9, ',.2f'):>11s}"
            f"{_or_dash(launched, ',.0f'):>12s}{stage['seconds']:>11,.1f}"
            f"{stage['seconds'] / plan['seconds']:>7.1%}"
        )
    total = plan["seconds"]
    lines.append(f"{'total':<18s}{'':>35s}{total:>11,.1f}{tqdm.format_interval(total):>9s}")
    if plan["compile_seconds"] is not None:
        seconds = f"{plan['compile_seconds']:,.0f} s"
        lines.append(f"and {seconds} more to compile, where no program is kept from earlier runs")
    if plan["causes"] and total > _HOUR:
        parts = ", ".join(f"{what} {s / 60:,.0f} min" for what, s in plan["causes"].items())
        lines.append(f"over an hour: {parts}")
    return "\n".join(lines)


def _memory(plan: dict[str, Any]) -> str:
    lines = []
    for place, peak in plan["memory_peaks"].items():
        items = _largest_items(plan, place, peak["phase"])
        size = peak["bytes"]
        if place == "host":
            items.append(("Python, JAX, programs, text", plan["base_bytes"]))
            size += plan["base_bytes"]
        where = "host and device" if plan["one_memory"] else place
        lines.append(f"memory, {where}: {_gib(size)} at most, in '{peak['phase']}'")
        lines += [f"  {name:<38s}{_gib(of):>12s}" for name, of in items]
        if place == "host" and plan["compile_bytes"]:
            more = f"{_gib(plan['compile_bytes'])} more that the compiler leaves behind"
            lines.append(f"  and {more}, where no program is kept from earlier runs")
        room = plan["memory_room"]
        if room is not None and (plan["one_memory"] or place == "device"):
            verdict = "fits" if size <= room else "DOES NOT FIT"
            lines.append(f"  {verdict}: {_gib(room)} are there")
    return "\n".join(lines)


def _largest_items(plan: dict[str, Any], place: str, phase: str) -> list[tuple[str, int]]:
    sizes: dict[str, int] = {}
    for item in plan["memory"]:
        if item["phase"] == phase and (plan["one_memory"] or item["where"] == place):
            sizes[item["name"]] = max(sizes.get(item["name"], 0), item["num_bytes"])
    return sorted(sizes.items(), key=lambda pair: -pair[1])


def _disk(plan: dict[str, Any]) -> str:
    peak = plan["disk_peak"]
    lines = [f"disk: {peak['bytes'] / 1e9:.2f} GB at most, in '{peak['phase']}'"]
    items = [item for item in plan["disk"] if item["phase"] == peak["phase"]]
    for item in sorted(items, key=lambda item: -item["num_bytes"]):
        lines.append(f"  {item['name']:<38s}{item['num_bytes'] / 1e9:>9.3f} GB")
    lines.append(f"  what stays: a checkpoint of {plan['checkpoint_bytes'] / 1e9:.3f} GB at most")
    return "\n".join(lines)


def _assumptions(plan: dict[str, Any]) -> str:
    return "\n".join(["assumed:", *(f"  {line}" for line in plan["assumptions"])])


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _or_dash(value: float | None, form: str) -> str:
    return format(value, form) if value else "-"
