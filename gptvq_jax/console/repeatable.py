"""The same bits twice on a GPU: what XLA is asked for before it starts.

Sums by index (of what belongs to a centroid) and some products are otherwise added up in the order
in which threads come. On CPUs and TPUs XLA has one order.
"""

import os
from importlib.metadata import entry_points

_FLAG = "--xla_gpu_deterministic_ops"
_GPUS = ("cuda", "rocm", "gpu")


def ask_for_repeatable_results() -> None:
    """Sets XLA_FLAGS where JAX may find a GPU, unless they say how already.

    What has no such implementation, XLA then refuses to compile.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in given and _may_find_a_gpu():
        os.environ["XLA_FLAGS"] = f"{given} {_FLAG}=true".strip()


def _may_find_a_gpu() -> bool:
    """Without starting JAX, after which flags would come too late."""
    wanted = os.environ.get("JAX_PLATFORMS", "").lower()
    if wanted and not any(name in wanted for name in _GPUS):
        return False
    plugins = entry_points(group="jax_plugins")
    return any(name in plugin.name.lower() for plugin in plugins for name in _GPUS)
