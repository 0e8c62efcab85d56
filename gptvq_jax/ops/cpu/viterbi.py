"""The C++ Viterbi search as a JAX function: streams on threads, windows in vector registers."""

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.ops.cpu.build import library


def available() -> bool:
    """Whether the kernel runs here; builds it on first use."""
    if jax.default_backend() != "cpu":
        return False
    try:
        library()
    except NotImplementedError:
        return False
    return True


def tail_biting(
    target: jax.Array,
    weight: jax.Array,
    table: jax.Array,
    rate: jax.Array,
    trace_back: int,
    overlap: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`moves.viterbi.search_streams` by the kernel: windows (n, T) int32 and losses (n,).

    Args:
      target, weight: (n, T), T at least L.
      table: (2^L,).
      rate: () int32.
      trace_back: rows searched on both sides of the cut, times those of a window.
      overlap: (n,) int32, of each stream; None: a search around the cut finds it.
    """
    library()
    shapes = (
        jax.ShapeDtypeStruct(target.shape, jnp.int32),
        jax.ShapeDtypeStruct(target.shape[:1], jnp.float32),
    )
    call = jax.ffi.ffi_call("gptvq_viterbi", shapes)
    if overlap is None:
        overlap = jnp.full(len(target), -1, jnp.int32)
    return call(
        target, weight, table, rate.astype(jnp.int32), overlap, trace_back=np.int64(trace_back)
    )
