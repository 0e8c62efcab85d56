"""Which kernel searches the streams of trellis-coded columns (moves/viterbi.py) here."""

import jax

from gptvq_jax.ops.cpu import viterbi as cpu
from gptvq_jax.ops.gpu import viterbi as gpu
from gptvq_jax.ops.tpu import viterbi as tpu


def choose_search(bits: int, rows: int, streams: int) -> str:
    """The `native` of `moves.viterbi.search_streams` for n streams of T rows, windows of L bits.

    The kernel of this backend; "jax" where there is none, or where it has no room for the streams.
    """
    backend = jax.default_backend()
    try:
        if backend == "cpu" and cpu.available():
            return "cpu"
        if backend == "tpu":
            tpu.check(bits, rows)
            return "pallas_tpu"
        if backend == "gpu":
            gpu.check(bits, rows, streams)
            return "pallas_gpu"
    except NotImplementedError:
        pass
    return "jax"
