"""Time of products with packed weights against dense and 4-bit ones, on the shapes of real layers.

What must move: the packed bytes of the weight, once; x and y are small beside it. At batch 1 a
dense float32 weight costs 32 bits per value, and a memory-bound kernel is faster in proportion.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.console.progress import Progress
from gptvq_jax.core.row_weight import RowWeight
from gptvq_jax.ops.int4 import GROUP_SIZE, random_int4
from gptvq_jax.ops.vq_matmul import make_kernel
from gptvq_jax.study.decode_formats import check_formats, random_quantized

# Outputs x inputs.
MODELS = {
    "smollm2": ((576, 576), (1536, 576), (576, 1536)),
    "7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "70b": ((8192, 8192), (28672, 8192), (8192, 28672)),
}
DENSE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_MOST_COPIES = 32  # of a weight: each is compiled
_MOST_SECONDS = 4  # that a contender may take: slow ones are measured in fewer rounds


class Contender(NamedTuple):
    """One way to hold a weight."""

    name: str
    implementation: str  # of vq_matmul; '' where there is no choice
    make: Callable[[int, int, int], Any]  # rows, cols, seed -> leaf with x @ leaf


def contenders(
    formats: Sequence[str], implementations: Sequence[str], dense: Sequence[str]
) -> list[Contender]:
    """Dense weights, int4 and every format in every implementation.

    Raises:
      ValueError: an unknown format or dtype.
    """
    check_formats(formats)
    for name in dense:
        if name not in DENSE:
            raise ValueError(f"unknown dtype {name!r}; choose from {', '.join(DENSE)}")
    listed = [Contender(name, "", partial(_dense, DENSE[name])) for name in dense]
    listed.append(Contender("int4_g128", "", random_int4))
    for name, implementation in itertools.product(formats, implementations):
        make = partial(_quantized, name, implementation)
        listed.append(Contender(name, implementation, make))
    return listed


def measure_all(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    chosen: Sequence[Contender],
    working_set: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """`measure` of all shapes and batches, with a bar."""
    rows = []
    with Progress(len(shapes) * len(batches) * len(chosen), "decode", "kernel") as progress:
        for shape, batch in itertools.product(shapes, batches):
            found = measure(*shape, batch, chosen, working_set, repeats, progress.advance)
            progress.advance(steps=sum("skipped" in row for row in found))
            rows += found
    return rows


def measure(
    rows: int,
    cols: int,
    batch: int,
    chosen: Sequence[Contender],
    working_set: int,
    repeats: int,
    on_contender: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """One row per contender, all measured in turn in every round, so that they share the weather.

    Each holds several different weights, which one compiled program multiplies one after another:
    they come from memory where together they are larger than the caches, as in a model.

    Args:
      rows, cols: of the weight, outputs x inputs.
      batch: rows of x.
      chosen: an implementation that cannot take its tensor here is left out, with the reason.
      working_set: bytes that the copies of a weight should reach together; 0: one copy.
      repeats: rounds.
      on_contender: called with the name of each once it is compiled.

    Returns:
      name, implementation (that was chosen, for 'auto'), skipped (reason) or: bits_per_value,
      bytes, copies, seconds (median), quartiles, gigabytes_per_second, and the medians of the
      ratios of seconds in the same round: to_float32, to_int4 (None: that was not measured).
    """
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, cols)), jnp.float32)
    if jax.default_backend() != "cpu":
        x = x.astype(jnp.bfloat16)
    results, programs = [], {}
    for index, contender in enumerate(chosen):
        row = {"name": contender.name, "implementation": contender.implementation}
        row |= {"rows": rows, "cols": cols, "batch": batch}
        results.append(row)
        if contender.name == "int4_g128" and cols % GROUP_SIZE:
            row["skipped"] = f"{cols} columns are not groups of {GROUP_SIZE}"
            continue
        try:
            weights, size = _copies(contender, rows, cols, working_set)
        except NotImplementedError as error:
            row["skipped"] = str(error)
            continue
        _products(x, weights[:1])  # compiled
        if _seconds(partial(_products, x, weights[:1])) * len(weights) > _MOST_SECONDS / 4:
            weights = weights[:1]
        jax.block_until_ready(_products(x, weights))
        row["implementation"] = getattr(weights[0], "implementation", "")
        row |= {"bytes": size, "bits_per_value": 8 * size / (rows * cols), "copies": len(weights)}
        programs[index] = partial(_products, x, weights)
        on_contender(contender.name)
    seconds = {index: np.full(repeats, np.nan) for index in programs}
    for repeat in range(repeats):
        for index, program in programs.items():
            copies = results[index]["copies"]
            if np.nansum(seconds[index]) * copies < _MOST_SECONDS:
                seconds[index][repeat] = _seconds(program) / copies
    by_name = {results[i]["name"]: measured for i, measured in seconds.items()}
    for index, measured in seconds.items():
        low, median, high = np.nanquantile(measured, (0.25, 0.5, 0.75))
        results[index] |= {
            "seconds": median,
            "quartiles": [low, high],
            "gigabytes_per_second": results[index]["bytes"] / median / 1e9,
            "to_float32": _ratio(measured, by_name.get("float32")),
            "to_int4": _ratio(measured, by_name.get("int4_g128")),
        }
    return results


def copy_bandwidth(size: int = 1 << 28, repeats: int = 7) -> float:
    """Bytes per second, read and written together, of copying `size` bytes on the device."""
    # In place: memory that is new to the process would cost page faults.
    copy = jax.jit(lambda a: a + 1, donate_argnums=0)
    array, seconds = copy(jnp.zeros(size // 4, jnp.float32)), []
    for _ in range(repeats):
        jax.block_until_ready(array)
        start = time.perf_counter()
        array = jax.block_until_ready(copy(array))
        seconds.append(time.perf_counter() - start)
    return 2 * size / min(seconds)


def _seconds(program: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - start


@jax.jit
def _products(x: jax.Array, weights: list[Any]) -> jax.Array:
    """x @ weight for each, one after another: each waits for the one before."""
    y = jnp.zeros((), x.dtype)
    for weight in weights:
        y = x @ weight
        x = x + y[:1, :1] * 1e-30
    return y


def _copies(contender: Contender, rows: int, cols: int, working_set: int) -> tuple[list, int]:
    def make(seed):
        return jax.tree.map(jnp.asarray, contender.make(rows, cols, seed))

    first = make(0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    count = min(_MOST_COPIES, max(1, -(-working_set // size)))
    return [first, *(make(seed) for seed in range(1, count))], size


def _quantized(name: str, implementation: str, rows: int, cols: int, seed: int) -> Any:
    tensor = random_quantized(name, rows, cols, seed)
    return make_kernel(jax.tree.map(jnp.asarray, tensor), implementation)


def _dense(dtype: Any, rows: int, cols: int, seed: int) -> RowWeight:
    return RowWeight(0.02 * jax.random.normal(jax.random.key(seed), (rows, cols), dtype))


def _ratio(measured: np.ndarray, base: np.ndarray | None) -> float | None:
    return None if base is None else float(np.nanmedian(measured / base))


def shapes_of(models: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(rows, cols) of the layers of some MODELS, or of a shape such as '4096x4096'.

    Raises:
      ValueError: neither.
    """
    for name in models:
        if name in MODELS:
            yield from MODELS[name]
            continue
        try:
            rows, cols = (int(size) for size in name.split("x"))
        except ValueError:
            known = ", ".join(MODELS)
            raise ValueError(f"{name!r} must be one of {known} or ROWSxCOLS") from None
        yield rows, cols
