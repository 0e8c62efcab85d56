"""The sections of scripts/check_device.py; each finds a few numbers in the seconds that it has."""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.console.processor import processor_name
from gptvq_jax.core.hessian import factorize
from gptvq_jax.core.metrics import relative_error
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.models.published import published
from gptvq_jax.ops.vq_matmul import IMPLEMENTATIONS, make_kernel, unsupported
from gptvq_jax.run.memory_check import host_memory
from gptvq_jax.study import decode_benchmark as bench
from gptvq_jax.study.decode_formats import FORMATS, random_quantized
from gptvq_jax.study.layer_benchmark import DAMPING, VQ_SETTINGS, quantize_with
from gptvq_jax.study.matmul_rate import SHAPES, best_rate, matmul_rate
from gptvq_jax.study.sample_layers import random_layer

_KERNEL_SHAPE = (256, 512)  # rows that no kernel's tile divides are tested elsewhere
_MOST_ERROR = {"float32": 1e-5, "bfloat16": 2e-2, "cpu_int8": 2e-2}
_NOT_CHECKED = ("aqlm_1x16",)  # whose codebook alone is larger than such a tensor
_DECODED = ("2d_2.125", "2d_3.125", "4d_2.25", "aqlm_2x8", "trellis_2.0")
_SETTING = "2d_2.125"
_OF_A_WEIGHT = 60  # operations of all moves for each weight and column ...
_OF_A_FACTOR = 2  # ... and of a factor for each of its entries and columns, estimates for the scale
_REACHED = 0.1  # of the rate of large products, by all of that


def device(seconds: float) -> dict[str, Any]:
    """What it is, and the rates that everything else is judged by."""
    first = jax.local_devices()[0]
    stats = first.memory_stats() or {}
    on_cpu = first.platform == "cpu"
    part = min(8.0, seconds / 6)
    shapes = SHAPES if on_cpu else (*SHAPES, (8192, 8192, 8192))
    return {
        "name": processor_name() if on_cpu else first.device_kind,
        "platform": first.platform,
        "devices": jax.local_device_count(),
        "memory_gigabytes": (host_memory() if on_cpu else stats.get("bytes_limit", 0)) / 1e9,
        "jax": jax.__version__,
        "float32_tflops": matmul_rate(shapes, part) / 1e12,
        "bfloat16_tflops": best_rate(shapes, part, _bfloat16_product) / 1e12,
        "copy_gigabytes": bench.copy_bandwidth(1 << (28 if on_cpu else 30)) / 1e9,
    }


def _bfloat16_product(shape: tuple[int, int, int]):
    m, k, n = shape
    left, right = jnp.full((m, k), 1.25, jnp.bfloat16), jnp.full((k, n), 0.75, jnp.bfloat16)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: multiply(left, right).block_until_ready()


def kernels(seconds: float, formats: Sequence[str] | None = None) -> dict[str, Any]:
    """Products with packed weights against float64, in every implementation that runs here.

    Raises:
      ValueError: one is wrong; says which.
    """
    end, rows, left = time.monotonic() + 0.9 * seconds, [], []
    names = formats or [name for name in FORMATS if name not in _NOT_CHECKED]
    for name in names:
        if time.monotonic() > end:
            left.append(name)
            continue
        tensor = random_quantized(name, *_KERNEL_SHAPE)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            weight = np.asarray(jax.tree.map(jnp.asarray, tensor).dequantize(), np.float64)
        for implementation in IMPLEMENTATIONS:
            if unsupported(tensor, implementation) is None:
                rows += _errors(name, tensor, weight, implementation)
    wrong = [row for row in rows if not row["error"] <= row["most"]]
    if wrong:
        worst = "; ".join("{name} {implementation} {dtype}: {error:.1e}".format(**r) for r in wrong)
        raise ValueError(f"{len(wrong)} of {len(rows)} products are wrong: {worst}")
    return {"rows": rows, "not_in_time": left}


def _errors(name: str, tensor: Any, weight: np.ndarray, implementation: str) -> list[dict]:
    """Of both dtypes of activations, with one row and with six."""
    kernel, rows = make_kernel(jax.tree.map(jnp.asarray, tensor), implementation), []
    for dtype, batch in (("float32", 1), ("float32", 6), ("bfloat16", 6)):
        x = np.random.default_rng(batch).normal(size=(batch, weight.shape[1]))
        x = jnp.asarray(x, dtype)
        expected = np.asarray(x, np.float64) @ weight.T
        found = np.asarray(jax.jit(lambda x, kernel: x @ kernel)(x, kernel), np.float64)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        most = max(_MOST_ERROR[dtype], _MOST_ERROR.get(implementation, 0))
        of = {"name": name, "implementation": implementation, "dtype": dtype, "batch": batch}
        rows.append({**of, "error": float(error), "most": most})
    return rows


def decode(seconds: float, shapes: Sequence[tuple[int, int]] | None = None) -> dict[str, Any]:
    """A token's products with packed and dense weights, as scripts/benchmark_decode.py has them.

    Raises:
      ValueError: nothing could be measured.
    """
    on_cpu, platform = jax.default_backend() == "cpu", jax.default_backend()
    own = [name for name, (of, _) in IMPLEMENTATIONS.items() if of == platform]
    implementations = ["auto"] if on_cpu else [*own, "xla"]
    names = [name for name in _DECODED if name in FORMATS]
    dense = ["float32"] if on_cpu else ["float32", "bfloat16"]
    chosen = bench.contenders(names, implementations, dense)
    wanted = shapes or ([(4096, 4096)] if on_cpu else [(4096, 4096), (8192, 28672)])
    begin, rows, left = time.monotonic(), [], []
    for shape in wanted:
        # The next one is larger, and takes as long at least.
        spent = time.monotonic() - begin
        if rows and spent * (len(rows) + 1) / len(rows) > seconds:
            left.append(list(shape))
            continue
        rows += bench.measure_all([shape], [1], chosen, (128 if on_cpu else 512) << 20, 15)
    if not [row for row in rows if "seconds" in row]:
        raise ValueError("no kernel could be measured")
    return {"rows": rows, "not_in_time": left}


def block(seconds: float, like: str, divisor: int | None = None) -> dict[str, Any]:
    """One block of a published model, by move: layers of its shapes, with random weights.

    Moves are differences between runs of the method with and without them. Widths are divided by a
    power of two where the whole block would not fit the time or the memory; both are estimated.

    Args:
      seconds: that it may take.
      like: a row of models/published.py.
      divisor: of the widths; None: the least that fits.

    Raises:
      ValueError: two runs on one layer differ, or one has an error that is not of a fit.
    """
    begin, divisor = time.monotonic(), divisor or _divisor(like, seconds)
    rows, left = [], []
    for shape, count in layer_counts(like, divisor).items():
        # One takes as long as those before it on average, with its compilation.
        spent = time.monotonic() - begin
        if rows and spent * (len(rows) + 1) / len(rows) > 0.9 * seconds:
            left.append(" x ".join(map(str, shape)))
            continue
        rows.append(_layer(*shape, count))
    total = {
        move: sum(r["count"] * r["seconds"][move] for r in rows) for move in rows[0]["seconds"]
    }
    found = {"like": like, "divided_by": divisor, "layers": rows, "seconds": total}
    return {**found, "not_in_time": left}


def layer_counts(like: str, divisor: int = 1) -> dict[tuple[int, int], int]:
    """{(R, C): layers of that shape in a block} with the widths divided."""
    fields = published(like)
    hidden, inner = (fields[n] // divisor for n in ("hidden_size", "intermediate_size"))
    key = hidden * fields["num_key_value_heads"] // fields["num_attention_heads"]
    counts: dict[tuple[int, int], int] = {}
    for shape in [(hidden, hidden)] * 2 + [(key, hidden)] * 2:
        counts[shape] = counts.get(shape, 0) + 1
    return {**counts, (inner, hidden): 2, (hidden, inner): 1}


def _divisor(like: str, seconds: float) -> int:
    rate, stats = matmul_rate(seconds=1.0), jax.local_devices()[0].memory_stats() or {}
    room = stats.get("bytes_limit") or host_memory()
    for power in range(8):
        shapes = layer_counts(like, 2**power)
        # Each is quantized seven times.
        flop = 7 * sum(_OF_A_WEIGHT * r * c * c + _OF_A_FACTOR * c**3 for r, c in shapes)
        most = max(4 * (12 * r * c + 6 * c * c) for r, c in shapes)
        if flop / (_REACHED * rate) < 0.5 * seconds and (room is None or most < 0.6 * room):
            break
    return 2**power


def _layer(rows: int, cols: int, count: int) -> dict[str, Any]:
    weight, hessian = random_layer(rows, cols)
    settings = dict(VQ_SETTINGS[_SETTING])
    settings["group_size"] = min(settings["group_size"], rows * min(cols, 64))

    def run(**counts):
        chosen = GPTVQSettings(**{**settings, **counts})
        tensor, taken = quantize_with(weight, hessian, "gptvq", chosen, f"{rows} x {cols}")
        return tensor, taken

    swept_only = dict(em_iterations=0, polish_rounds=0, codebook_update="none")
    fit = {**swept_only, "em_iterations": 10}
    _, cold = run(**swept_only)
    start = time.perf_counter()
    jax.block_until_ready(factorize(hessian, DAMPING).hinv_chol)
    factor = time.perf_counter() - start
    _, swept = run(**swept_only)
    first, fitted = run(**fit)
    same, again = run(**fit)
    fitted = min(fitted, again)
    _, recoded = run(**{**fit, "polish_rounds": 1})
    refit = {**fit, "codebook_update": "least_squares"}
    _, cold_refit = run(**refit)
    tensor, refitted = run(**refit)
    if not all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(same))):
        raise ValueError(f"a layer of {rows} x {cols} is not the same to the last bit, run twice")
    error = float(relative_error(weight, tensor.dequantize(), hessian))
    if not 0 < error < 1:
        raise ValueError(f"a layer of {rows} x {cols} has a relative error of {error}")
    seconds = {
        "factor": factor,
        "seed and sweep": max(0.0, swept - factor),
        "10 rounds of EM": max(0.0, fitted - swept),
        "recode": max(0.0, recoded - fitted),
        "refit": max(0.0, refitted - fitted),
        "compilation": max(0.0, cold - swept) + max(0.0, cold_refit - refitted),
    }
    shape = {"rows": rows, "cols": cols, "count": count}
    return {**shape, "seconds": seconds, "relative_error": error}


def smoke(seconds: float, script: Path, config: str) -> dict[str, Any]:
    """The first blocks of SmolLM2, by scripts/quantize.py in a process of its own.

    Raises:
      ValueError: it failed, or its figures are no numbers.
    """
    with tempfile.TemporaryDirectory(prefix="gptvq-") as root:
        work = Path(root) / "run"
        command = [sys.executable, str(script), f"--config={config}", f"--workdir={work}"]
        begin = time.perf_counter()
        # It ends before the process of this section does, which would leave it behind.
        most = max(0.9 * seconds - 2, 1.0)
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            done = subprocess.run(command, timeout=most, **pipes)
        except subprocess.TimeoutExpired:
            message = f"scripts/quantize.py took longer than {most:.0f} s; give more with --minutes"
            raise ValueError(message) from None
        taken = time.perf_counter() - begin
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"scripts/quantize.py ended with status {done.returncode}: {last}")
        row = json.loads((work / "metrics.jsonl").read_text().splitlines()[-1])
    names = "perplexity_float", "perplexity_quantized", "bits_per_value"
    found = {name: row[name] for name in names}
    if not all(math.isfinite(value) for value in found.values()):
        raise ValueError(f"figures of the run are {found}")
    return {**found, "seconds": taken, "peak_memory_gigabytes": row["peak_memory_bytes"] / 1e9}
