"""Every method and setting on saved layers: error, bits, seconds cold and warm."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax import metrics
from gptvq_jax.gptvq import GPTVQSettings
from gptvq_jax.hessian import factorize, zero_dead
from gptvq_jax.methods import METHODS
from gptvq_jax.uniform import UniformSettings
from gptvq_jax.vq_tensor import dequantize

# Named by dimension and nominal bits; the groups are those of the published measurements on the
# official code: 4 x 64, 32 x 64, 64 x 192 and 192 x 192 weights.
VQ_SETTINGS = {
    "1d_2.125": dict(dim=1, bits=2.0, group_size=256, max_group_cols=64),
    "2d_2.125": dict(dim=2, bits=2.0, group_size=2048, max_group_cols=64),
    "2d_3.083": dict(dim=2, bits=3.0, group_size=12288, max_group_cols=192),
    "4d_2.222": dict(dim=4, bits=2.0, group_size=36864, max_group_cols=192),
}
UNIFORM_SETTINGS = {
    f"int{bits}_g128": dict(bits=bits, group_size=128, symmetric=True) for bits in (2, 3, 4)
}
DAMPING = 0.01


def settings_of(method: str) -> dict[str, Any]:
    """{name: settings} that a method is measured with."""
    if METHODS[method].settings is UniformSettings:
        return {name: UniformSettings(**s) for name, s in UNIFORM_SETTINGS.items()}
    return {name: GPTVQSettings(**s) for name, s in VQ_SETTINGS.items()}


def load_layer(path: Path) -> tuple[jax.Array, jax.Array]:
    """weight (R, C) and hessian (C, C) of a .npz; the scale of the Hessian does not matter."""
    with np.load(path) as arrays:
        if not {"weight", "hessian"} <= set(arrays):
            raise ValueError(f"{path} must hold 'weight' and 'hessian', it has {list(arrays)}")
        return jnp.asarray(arrays["weight"]), jnp.asarray(arrays["hessian"])


def measure(path: Path, method: str, setting: str) -> dict[str, Any]:
    """One row: the layer is quantized twice, with and without compilation."""
    weight, hessian = load_layer(path)
    settings = settings_of(method)[setting]

    def once() -> tuple[Any, float]:
        start = time.perf_counter()
        factor = factorize(hessian, DAMPING, path.stem)
        tensor = METHODS[method].quantize(
            zero_dead(weight, hessian), hessian, factor.hinv_chol, jax.random.key(0), settings
        )
        jax.block_until_ready(tensor)
        return tensor, time.perf_counter() - start

    _, cold = once()
    tensor, warm = once()
    error = float(metrics.relative_error(weight, dequantize(tensor), hessian))
    return {
        "layer": path.stem,
        "method": method,
        "setting": setting,
        "relative_error": error,
        "sqnr_db": float(metrics.sqnr_db(error)),
        "bits_per_value": tensor.bits_per_value,
        "seconds_cold": cold,
        "seconds": warm,
    }


def measure_all(
    directory: Path, methods: list[str], settings: list[str] | None
) -> Iterator[dict[str, Any]]:
    """Rows for every layer file of a directory.

    Args:
      directory: holds .npz files with 'weight' and 'hessian'.
      methods: names in METHODS.
      settings: names to keep; None: all that a method has.

    Raises:
      ValueError, FileNotFoundError: no layers, or an unknown method or setting.
    """
    files = sorted(directory.glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"no .npz files in {directory}; pass --layers=DIR")
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}")
    known = {name for method in methods for name in settings_of(method)}
    for name in settings or []:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; choose from {', '.join(sorted(known))}")
    for path in files:
        for method in methods:
            for name in settings_of(method):
                if settings is None or name in settings:
                    yield measure(path, method, name)
