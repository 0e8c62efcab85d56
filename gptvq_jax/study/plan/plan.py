"""The plan of a config: memory, disk, work and time, before anything runs."""

from collections.abc import Collection
from typing import Any

import jax

from gptvq_jax.config import RunSettings, from_config
from gptvq_jax.console.processor import processor_name
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.run import memory
from gptvq_jax.run.disk import disk_items, disk_peak, most_stored_bytes
from gptvq_jax.run.formats import check_formats, check_given
from gptvq_jax.run.memory_check import host_memory
from gptvq_jax.run.overrides import settle
from gptvq_jax.study.plan import devices, predict
from gptvq_jax.study.plan.rates import measure
from gptvq_jax.study.plan.shapes import model_shapes

HERE = "measured on this machine"
PUBLISHED = "predicted from published rates"
# Tokens of a held-out text that is taken as a whole: WikiText-2's test split, Llama 2's tokenizer.
_TOKENS = {"wikitext2": 341_469}
_OTHER_TOKENS = 300_000
_UNKNOWN_BASE = 1 << 30  # of Python, JAX and compiled programs, where nothing is measured
# Of the tokenizer and of texts while they are tokenized, as those of SmolLM2 and of Wikipedia take.
_TOKEN_BYTES, _OF_TEXT = 1400, 18


def make_plan(
    config: Any,
    name: str,
    device: str | None = None,
    like: str | None = None,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """Everything that scripts/plan.py prints, as JSON has it.

    Args:
      config: ConfigDict, as from `default_config`.
      name: of it, for its shapes.
      device: a key of devices.DEVICES; None: this machine, which is measured for half a minute.
      like: as in shapes.model_shapes.
      given: fields of the config that the command line names.

    Raises:
      ValueError, FileNotFoundError: bad input, in one line that names the fix.
    """
    config, _ = settle(config, given)
    settings = from_config(config)
    if device is not None and device not in devices.DEVICES:
        known = ", ".join(devices.DEVICES)
        raise ValueError(f"--device={device} is none of {known}; leave it out for this machine")
    shapes, source = model_shapes(settings.model, name, like)
    check_formats(settings, shapes)
    check_given(settings, shapes, given)
    windows, assumptions = _windows(settings)
    assumptions = [f"shapes of {source}", *assumptions]
    if device is None:
        return _here(shapes, settings, name, windows, assumptions)
    return _there(shapes, settings, name, windows, assumptions, devices.DEVICES[device])


def _here(
    shapes: ModelConfig, settings: RunSettings, name: str, windows: int, assumptions: list[str]
) -> dict[str, Any]:
    every = [*predict.uses(shapes, settings), *predict.quick_uses(shapes, settings)]
    rates = measure(shapes, settings, predict.to_probe(every))
    stages = predict.here(shapes, settings, windows, rates)
    compiled, kept = predict.compile_seconds(shapes, settings, rates)
    stages.append(predict.Stage("kept programs", 0, 0, None, kept))
    shared = jax.default_backend() == "cpu"
    assumptions += [
        "all rounds and epochs run, none stops early",
        "nothing else runs on this machine",
        f"text is tokenized at {predict.TOKENIZED / 1e6:g} MB/s, weights are read at "
        f"{predict.DECODED / 1e9:g} GB/s of float32, checkpoints stored at "
        f"{predict.STORED / 1e9:g} GB/s; {predict.LAYER:g} s go to each layer beside its program",
    ]
    room = host_memory() if shared else None
    if not shared:
        stats = jax.local_devices()[0].memory_stats() or {}
        room = stats.get("bytes_limit")
    return {
        **_common(shapes, settings, name, windows, jax.default_backend(), shared),
        "device": processor_name() if shared else jax.local_devices()[0].device_kind,
        "basis": HERE,
        "assumptions": assumptions,
        "base_bytes": rates.base_bytes + _text_bytes(shapes, settings),
        "memory_room": room,
        "rates": {
            "product_tflops": rates.products / 1e12,
            "stage_tflops": {k: v / 1e12 for k, v in rates.by_stage.items()},
            "factor_tflops": rates.factor / 1e12,
            "file_gigabytes": rates.files / 1e9,
            "launch_seconds": rates.launch,
        },
        "stages": [stage._asdict() for stage in stages],
        "seconds": sum(stage.seconds for stage in stages),
        "compile_seconds": max(0.0, compiled - kept),
        "compile_bytes": predict.compile_bytes(shapes, settings, rates),
        "causes": None,
    }


def _there(
    shapes: ModelConfig,
    settings: RunSettings,
    name: str,
    windows: int,
    assumptions: list[str],
    device: devices.Device,
) -> dict[str, Any]:
    common = _common(shapes, settings, name, windows, "gpu", False)
    base = _UNKNOWN_BASE + _text_bytes(shapes, settings)
    in_memory = base + common["memory_peaks"]["host"]["bytes"] + common["disk_peak"]["bytes"]
    kept = in_memory <= predict.KEPT_PART * device.host_memory
    stages = predict.elsewhere(shapes, settings, windows, device, kept)
    counted = next((s.launches for s in stages if s.name == "quantize"), None)
    assumptions += [
        f"float32 products reach {devices.REACHED:.0%} of {device.float32 / 1e12:.3g} TFLOP/s "
        f"({device.basis}), bfloat16 ones as much of {device.bfloat16 / 1e12:.3g}",
        f"Hessians are multiplied in {settings.calibration.products}, the model on the calibration "
        f"text in {settings.calibration.model_products}, asymmetric targets solved in "
        f"{settings.solve_products}, models evaluated in {settings.evaluation.products}; all else "
        "is float32",
        f"a kernel takes {device.launch * 1e6:g} us from one to the next, and its own time is in "
        "the products",
        "launches are those of programs compiled for an H100: blocks of columns by one kernel; "
        "refits, residuals and packing, some hundred for each layer, are not counted"
        if counted
        else "launches of this method are not known and not counted",
        f"weights are read, and files written that a resumed run needs, at "
        f"{predict.FILES / 1e9:g} GB/s",
        _files_text(device, in_memory, kept),
        f"activations go to the device and back at {device.host_link / 1e9:g} GB/s",
        "all rounds and epochs run, none stops early; programs are compiled already",
        "one chip, the model streamed through it a block at a time",
    ]
    return {
        **common,
        "device": device.title,
        "basis": PUBLISHED,
        "assumptions": assumptions,
        "base_bytes": base,
        "memory_room": int(device.memory),
        "rates": {
            "product_tflops": device.float32 / 1e12,
            "memory_gigabytes": device.bandwidth / 1e9,
            "launch_seconds": device.launch,
        },
        "stages": [stage._asdict() for stage in stages],
        "seconds": sum(stage.seconds for stage in stages),
        "compile_seconds": None,
        "compile_bytes": 0,
        "causes": predict.causes(stages, device),
    }


def _files_text(device: devices.Device, size: float, kept: bool) -> str:
    """Whether the host's memory has room for the files beside its arrays, and what follows."""
    room, part = f"{device.host_memory / 1e9:.0f} GB", f"{predict.KEPT_PART:.0%}"
    if kept:
        return (
            f"a host of {room}, {part} of which keep {size / 1e9:.0f} GB of arrays and files: "
            f"other files are copied in memory, at {predict.KEPT_FILES / 1e9:g} GB/s"
        )
    return (
        f"a host of {room}, {part} of which do not keep {size / 1e9:.0f} GB of arrays and files: "
        f"all are read and written at {predict.FILES / 1e9:g} GB/s"
    )


def _common(
    shapes: ModelConfig, settings: RunSettings, name: str, windows: int, platform: str, shared: bool
) -> dict[str, Any]:
    """What no rate has a say in."""
    items = memory.memory_items(shapes, settings, platform)
    on_disk = disk_items(shapes, settings, windows)
    size, phase = disk_peak(on_disk)
    found = memory.peaks(items, shared)
    return {
        "config": name,
        "model": settings.model,
        "blocks": shapes.num_hidden_layers,
        "one_memory": shared,
        "memory": [item._asdict() for item in items],
        "memory_peaks": {
            place: {"bytes": most, "phase": at} for place, (most, at) in found.items()
        },
        "disk": [item._asdict() for item in on_disk],
        "disk_peak": {"bytes": size, "phase": phase},
        "checkpoint_bytes": most_stored_bytes(shapes, settings),
    }


def _text_bytes(shapes: ModelConfig, settings: RunSettings) -> int:
    """Of the tokenizer, and of what tokenizing leaves behind."""
    text = predict.TOKENIZED * predict.text_seconds(settings)
    return int(_TOKEN_BYTES * shapes.vocab_size + _OF_TEXT * text)


def _windows(settings: RunSettings) -> tuple[int, list[str]]:
    """Of the held-out text, and what was assumed for them."""
    e = settings.evaluation
    if e.num_windows:
        return e.num_windows, []
    tokens = _TOKENS.get(e.dataset, _OTHER_TOKENS)
    return max(1, tokens // e.seqlen), [f"the held-out text, {e.dataset}, has {tokens} tokens"]
