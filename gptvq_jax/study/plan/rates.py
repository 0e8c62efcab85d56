"""What this machine does in a second, measured on programs of the run itself, in half a minute.

Each probe is a program that the run executes, on a batch of random numbers of its shapes, or, where
a block is too large for seconds, on a block whose widths are divided. It is called once, which
compiles it, and then again; the persistent cache of compiled programs is left out, so that the
difference is what compiling it takes.
"""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.config import RunSettings
from gptvq_jax.console.progress import Progress
from gptvq_jax.core import flops as core_flops
from gptvq_jax.core.hessian import factorize
from gptvq_jax.files.durable import write_text
from gptvq_jax.methods.layer import Objective, Problem, quantize_layers
from gptvq_jax.methods.pool import num_workers
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import pair_chunk
from gptvq_jax.models.llama import Params, block_forward
from gptvq_jax.models.shapes import block_shapes
from gptvq_jax.models.source import block_tree
from gptvq_jax.run.activations import Activations, writing
from gptvq_jax.run.calibrate import LAST, FloatStates, init_moments, step
from gptvq_jax.run.forward import block_halves, wants_middle
from gptvq_jax.run.gradients import block_backward, head_backward
from gptvq_jax.run.token_losses import token_figures
from gptvq_jax.run.work import moments_flop
from gptvq_jax.study.matmul_rate import matmul_rate

_MOST_FLOP = 4e10  # of a probe of a block, ...
_MOST_WEIGHTS = 2.5e7  # ... and of its weights
_PROBE_COLS = 1024  # of a layer that is quantized, at most
_REPEATS = 3


@dataclasses.dataclass
class Rates:
    """Of a machine; FLOP/s, bytes/s and seconds.

    Attributes:
      products: FLOP/s of large float32 products.
      by_stage: FLOP/s of stages, as their programs reach them.
      factor: FLOP/s of factors of Hessians.
      files: bytes/s of activations through files.
      sync: seconds until a small file is safe on the disk.
      launch: seconds of a program that does nothing.
      per_weight: seconds for each weight beside the products, by settings of a method.
      compile: seconds of one thread, by program.
      base_bytes: memory of this process with its compiled programs, without arrays.
      program_bytes: what each program that quantizes layers left behind when it was compiled.
    """

    products: float = 0.0
    by_stage: dict[str, float] = dataclasses.field(default_factory=dict)
    factor: float = 0.0
    files: float = 0.0
    sync: float = 0.0
    launch: float = 0.0
    per_weight: dict[Any, float] = dataclasses.field(default_factory=dict)
    compile: dict[str, float] = dataclasses.field(default_factory=dict)
    base_bytes: int = 0
    program_bytes: list[int] = dataclasses.field(default_factory=list)


def measure(config: ModelConfig, settings: RunSettings, methods: list[Any]) -> Rates:
    """Measures what a run needs, with a bar.

    Args:
      config: of the model.
      settings: of the run.
      methods: settings that layers are quantized with, each a probe.
    """
    rates = Rates()
    parts: list[tuple[str, Callable[[], None]]] = [
        ("matrix products", partial(_products, rates)),
        ("files", partial(_files, rates, settings)),
        ("launches", partial(_launches, rates)),
        ("forward", partial(_forward, rates, config, settings)),
        ("sums", partial(_sums, rates, config, settings)),
        ("factors", partial(_factors, rates, config)),
        ("head", partial(_head, rates, config, settings)),
    ]
    if settings.weight_groups or settings.tune.block:
        parts.append(("gradients", partial(_gradients, rates, config, settings)))
    parts += [("a layer", partial(_layer, rates, config, settings, of)) for of in methods]
    with Progress(len(parts), "measuring this machine", "part") as progress, _uncached():
        for name, part in parts:
            progress.note(name)
            part()
            progress.advance(name)
    rates.base_bytes = resident_bytes()
    return rates


def resident_bytes() -> int:
    """Memory that this process has now; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return 1024 * int(sizes["VmRSS"].split()[0])
    except (OSError, KeyError, ValueError):
        return 0


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _timed(call: Callable[[], Any], repeats: int = _REPEATS) -> tuple[float, float]:
    """Least seconds of a call, and what the first one took beyond it."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    first, best = time.perf_counter() - start, math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - start)
        if best > 2:
            break
    return best, max(0.0, first - best)


def _products(rates: Rates) -> None:
    rates.products = matmul_rate()


def _files(rates: Rates, settings: RunSettings) -> None:
    """Activations as a pass writes and reads them, with the casts to and from float32."""
    shape = 4, min(settings.calibration.seqlen, 1024), 1024
    values = np.ones(shape, np.float32)
    with tempfile.TemporaryDirectory(prefix="gptvq-") as root:
        path = Path(root) / "x.npy"

        def there_and_back():
            with writing(path, shape) as out:
                out[0:4] = values
            return jnp.asarray(Activations(path)[0:4], jnp.float32)

        seconds, _ = _timed(there_and_back)
        rates.sync = min(_timed(lambda: write_text(path, "x"))[0] for _ in range(2))
    rates.files = 2 * 2 * values.size / max(seconds - rates.sync, 1e-6)


def _launches(rates: Rates) -> None:
    count, one = 200, jnp.zeros(8)
    nothing = jax.jit(lambda x: x + 1)

    def many():
        x = one
        for _ in range(count):
            x = nothing(x)
        return x

    rates.launch = _timed(many)[0] / count


def probe_config(config: ModelConfig) -> ModelConfig:
    """Of block 0, its widths divided until it is small enough to be measured in seconds."""
    block = config.of_block(0)
    divisor = 1
    while True:
        small = divided(block, divisor)
        size = sum(map(math.prod, block_shapes(small).values()))
        if size <= _MOST_WEIGHTS or small.num_key_value_heads == 1 and small.hidden_size <= 512:
            return small
        divisor *= 2


def divided(block: ModelConfig, divisor: int) -> ModelConfig:
    """A block of such a family with its widths divided; heads keep theirs."""
    if divisor == 1:
        return block
    keys = max(1, block.num_key_value_heads // divisor)
    per_key = block.num_attention_heads // block.num_key_value_heads
    return dataclasses.replace(
        block,
        hidden_size=max(64, block.hidden_size // divisor),
        intermediate_size=max(64, block.intermediate_size // divisor),
        expert_size=block.expert_size and max(32, block.expert_size // divisor),
        num_key_value_heads=keys,
        num_attention_heads=keys * per_key,
    )


def random_block(block: ModelConfig) -> Params:
    """Parameters in float32, kernels (in, out)."""
    generator, leaves = np.random.default_rng(0), {}
    for name, shape in block_shapes(block).items():
        if len(shape) == 2:
            values = generator.standard_normal(shape[::-1], np.float32) / math.sqrt(shape[1])
        else:
            values = np.ones(shape, np.float32)
        leaves[f"model.layers.0.{name}"] = jnp.asarray(values)
    return block_tree(leaves)


def _batch(block: ModelConfig, batch: int, time_: int, most: float = _MOST_FLOP) -> tuple[int, int]:
    """(windows, tokens of each) of a probe: those of the run, or fewer."""
    while batch > 1 and flops.block_forward(block, batch, time_) > most:
        batch //= 2
    return batch, time_


def _inputs(block: ModelConfig, batch: int, time_: int) -> jax.Array:
    values = np.random.default_rng(1).standard_normal((batch, time_, block.hidden_size), np.float32)
    return jnp.asarray(values)


def _forward(rates: Rates, config: ModelConfig, settings: RunSettings) -> None:
    """The block in both of its shapes: of calibration, and of the held-out text."""
    block, c, e = probe_config(config), settings.calibration, settings.evaluation
    params = random_block(block)
    shape = _batch(block, c.batch_size, c.seqlen)
    x = _inputs(block, *shape)
    seconds, compiling = _timed(lambda: block_halves(block, params, x))
    rates.by_stage["forward"] = rates.by_stage["advance"] = (
        flops.block_forward(block, *shape) / seconds
    )
    rates.compile["block"] = compiling
    shape = _batch(block, e.batch_size, e.seqlen)
    x = _inputs(block, *shape).astype(e.products)
    seconds, _ = _timed(lambda: block_forward(block, params, x))
    rates.by_stage["evaluate"] = flops.block_forward(block, *shape) / seconds


def _sums(rates: Rates, config: ModelConfig, settings: RunSettings) -> None:
    """A batch through the stages of a block, and its moments."""
    block, c = probe_config(config), settings.calibration
    params, crosses = random_block(block), wants_middle(settings)
    shape = _batch(block, c.batch_size, c.seqlen, _MOST_FLOP / 2)
    x = _inputs(block, *shape)
    states = FloatStates(x, x, x) if crosses else None
    moments = init_moments(block, params, range(LAST), None, crosses, c.products)

    def run():
        nonlocal moments
        of_float = params if crosses else None
        arguments = block, params, x, None, 0, LAST - 1, moments, None, states, of_float
        *_, moments = step(*arguments)
        return moments

    seconds, compiling = _timed(run)
    size = flops.stage_flops(block, range(LAST - 1), *shape)
    if crosses:
        size += flops.closing_outputs(block, range(LAST), *shape)
    plain = dataclasses.replace(settings, calibration=dataclasses.replace(c, gradient_groups=0))
    size += moments_flop(block, plain, shape[0] * shape[1], range(LAST), crosses)
    rates.by_stage["hessians"] = size / seconds
    rates.compile["sums"] = compiling


def _factors(rates: Rates, config: ModelConfig) -> None:
    cols = min(config.hidden_size, 1536)
    hessian = random_hessian(cols)
    seconds, _ = _timed(lambda: factorize(hessian, 0.01).hinv_chol)
    rates.factor = core_flops.inverse_cholesky(cols) / seconds


def random_hessian(cols: int) -> jax.Array:
    """Mean x x^T of correlated inputs (C, C)."""
    generator = np.random.default_rng(2)
    x = generator.standard_normal((2 * cols, cols), np.float32)
    x += generator.standard_normal((2 * cols, 1), np.float32)
    return jnp.asarray(x.T @ x / len(x))


def _head(rates: Rates, config: ModelConfig, settings: RunSettings) -> None:
    """Figures of a batch of short windows; a vocabulary of at most 32,768 tokens."""
    e = settings.evaluation
    width = min(config.hidden_size, 1024)
    small = dataclasses.replace(
        config,
        hidden_size=width,
        vocab_size=min(config.vocab_size, 32768),
        tie_word_embeddings=True,
    )
    batch, tokens = min(e.batch_size, 4), 129
    table = np.random.default_rng(3).standard_normal((small.vocab_size, width), np.float32)
    outer = {
        "embed_tokens": {"embedding": jnp.asarray(table / math.sqrt(width))},
        "norm": {"scale": jnp.ones(width)},
    }
    x = _inputs(small, batch, tokens)
    ids = jnp.zeros((batch, tokens), jnp.int32)
    both = small, outer, x.astype(e.products)
    seconds, compiling = _timed(lambda: token_figures(*both, *both, ids))
    chunk = pair_chunk(small, batch)
    rates.by_stage["head"] = 2 * flops.head_forward(small, batch, tokens, chunk) / seconds
    rates.compile["head"] = compiling
    if settings.weight_groups:
        seconds, _ = _timed(lambda: head_backward(small, outer, x, ids))
        rates.by_stage["head backward"] = flops.head_backward(small, batch, tokens) / seconds


def _gradients(rates: Rates, config: ModelConfig, settings: RunSettings) -> None:
    block, c = probe_config(config), settings.calibration
    params = random_block(block)
    shape = _batch(block, c.batch_size, c.seqlen, _MOST_FLOP / 3)
    x = _inputs(block, *shape)
    groups = settings.weight_groups or 1
    seconds, compiling = _timed(lambda: block_backward(block, params, x, x, groups))
    rates.by_stage["gradients"] = flops.block_backward(block, *shape) / seconds
    rates.by_stage["tune"] = rates.by_stage["gradients"]
    rates.compile["gradients"] = compiling


def probe_shape(settings: Any, rows: int, cols: int) -> tuple[int, int]:
    """(R, C) of a layer that keeps all cores busy for a moment, with the parts of a true one."""
    cols = min(cols, _PROBE_COLS)
    split = getattr(settings, "parts", None)
    if split is None:
        return min(rows, 512), cols
    grid, _ = split(rows, cols)
    return min(rows, grid.rows * num_workers()), cols


def _layer(
    rates: Rates, config: ModelConfig, settings: RunSettings, of: tuple[str, Any, tuple[int, int]]
) -> None:
    """A layer is quantized: what that takes beside its products, for each weight."""
    method, chosen, shape = of
    rows, cols = probe_shape(chosen, *shape)
    generator = np.random.default_rng(4)
    weight = jnp.asarray(generator.standard_normal((rows, cols), np.float32) / math.sqrt(cols))
    hessian = random_hessian(cols)
    objective = Objective(hessian, factorize(hessian, settings.damping), None, hessian)
    problem = Problem(METHODS[method].quantize, chosen, weight, [objective], jax.random.key(0))

    def run():
        return jax.tree.leaves(quantize_layers([problem])[0])

    before = resident_bytes()
    seconds, compiling = _timed(run, 2)
    rates.program_bytes.append(max(0, resident_bytes() - before))
    products = chosen.flops(rows, cols) / rates.products
    rates.per_weight[chosen] = max(seconds - products, 0.1 * seconds) / (rows * cols)
    rates.compile[f"a layer, {method}"] = max(compiling, rates.compile.get(f"a layer, {method}", 0))
