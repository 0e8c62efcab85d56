"""What a machine can do at best: the rate of float32 matrix products of the shapes of a job."""

import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# m x k x n: tokens through a layer of SmolLM2, its Hessians and layers, and up to those of a 7B.
SHAPES = ((2048, 576, 1536), (1536, 2048, 1536), (2048, 2048, 2048), (4096, 4096, 4096))
_SECONDS = 1.2  # for all of them, compilation apart
_PART = 0.25  # of what is left, for one shape

Shape = tuple[int, int, int]


def matmul_rate(shapes: Sequence[Shape] = SHAPES, seconds: float = _SECONDS) -> float:
    """The best rate of jnp.matmul in float32, in FLOP/s, over shapes and repetitions.

    Args:
      shapes: m, k, n of products (m, k) @ (k, n), small ones first.
      seconds: that the measurement may take; shapes that would not fit are left out.
    """
    return best_rate(shapes, seconds, _product)


def best_rate(
    shapes: Sequence[Shape],
    seconds: float,
    product: Callable[[Shape], Callable[[], None]],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """As `matmul_rate`, of products that the caller makes: m, k, n -> what runs one to its end."""
    best, spent = 0.0, 0.0
    for i, shape in enumerate(shapes):
        flop = 2 * math.prod(shape)
        # Two calls at the best rate so far: the first may come before all threads are there.
        if best and 2 * flop / best > seconds - spent:
            continue
        run = product(shape)
        run()  # compiles
        room = (seconds - spent) * (1 if i == len(shapes) - 1 else _PART)
        start = clock()
        while True:
            before = clock()
            run()
            now = clock()
            best = max(best, flop / max(now - before, 1e-9))
            if now - start + (now - before) > room:
                break
        spent += now - start
    return best


def _product(shape: Shape) -> Callable[[], None]:
    m, k, n = shape
    left = jnp.full((m, k), 1.25, jnp.float32)
    right = jnp.full((k, n), 0.75, jnp.float32)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    return lambda: multiply(left, right).block_until_ready()
