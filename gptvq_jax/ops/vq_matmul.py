"""y = x @ dequantize(W)^T from the packed codes, by an implementation that is named or chosen.

An implementation is a module of this package with these names:

    KINDS                the classes of tensors that it takes, if not VQTensor alone
    check(tensor)        raises NotImplementedError for a tensor it does not support
    pack(tensor)         the tensor in the layout that its kernel reads, still packed; done once
    matmul(x, packed)    x (N, C) -> (N, R) float32
    call(packed)         the C++ call that matmul is, if it is nothing else

None of them sees row scales of a VQTensor: they commute with the product, so they are taken off the
tensor first and VQKernel multiplies by them.
"""

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from gptvq_jax.console.user_cache import VARIABLE
from gptvq_jax.core.check_tensor import check_tensor
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.ops.cpu.call import Call

# Name -> (platform it runs on, or None for all; what it is).
IMPLEMENTATIONS = {
    "reference": (None, "plain jnp in float32"),
    "xla": (None, "jnp, fused by the compiler"),
    "pallas_tpu": ("tpu", "Pallas kernel for TPUs"),
    "pallas_gpu": ("gpu", "Pallas kernel for NVIDIA GPUs"),
    "cuda": ("gpu", "CUDA C++ kernel for NVIDIA GPUs"),
    "cpu": ("cpu", "C++ kernel, float32 activations"),
    "cpu_int8": ("cpu", "C++ kernel, activations rounded to int8 with one scale per row"),
}
# What 'auto' tries, in this order.
_PREFERRED = {
    "cpu": ("cpu", "xla"),
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("cuda", "pallas_gpu", "xla"),
}
# Left by 'auto' to those who ask by name: tables may cost more than they save (docs/kernels.md).
_DOUBTFUL = {("pallas_gpu", TrellisTensor)}
_CODES = {VQTensor: "codes of centroids", TrellisTensor: "trellis codes"}
_static = partial(dataclasses.field, metadata={"static": True})


def vq_matmul(x: jax.Array, tensor: QuantizedTensor, *, implementation: str = "auto") -> jax.Array:
    """x @ dequantize(tensor)^T, accumulated in float32.

    Args:
      x: (..., C) floating point; its dtype is that of the result.
      tensor: of shape (R, C).
      implementation: a key of IMPLEMENTATIONS, or 'auto': the first of those preferred on this
        platform that supports the tensor, named once in the log.

    Returns:
      (..., R).

    Raises:
      ValueError: an unknown implementation, x is not floating point with C columns, or the arrays
        of the tensor do not fit each other (`check_tensor`).
      NotImplementedError: the named implementation does not support the tensor or the platform.
    """
    return x @ make_kernel(tensor, implementation)


def make_kernel(tensor: QuantizedTensor, implementation: str = "auto") -> "VQKernel":
    """The tensor as a leaf that takes the place of a dense kernel (in, out): x @ leaf.

    Args and errors are those of `vq_matmul`. Where it runs many times, make it once: some
    implementations rearrange the codes.
    """
    check_tensor(tensor)
    return pack(tensor, _choose(tensor, implementation))


def pack(tensor: QuantizedTensor, implementation: str) -> "VQKernel":
    """`make_kernel` without asking whether the named implementation runs here."""
    check_tensor(tensor)  # implementations and their kernels do not look again
    rows, cols = tensor.shape
    tensor, row_scales = tensor.take_row_scales()
    packed = _module(implementation).pack(tensor)
    return VQKernel(packed, row_scales, implementation, (cols, rows))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VQKernel:
    """A quantized weight in the layout of one implementation; a pytree whose leaves are packed."""

    packed: Any
    row_scales: jax.Array | None  # (R,) float16
    implementation: str = _static()
    shape: tuple[int, int] = _static()  # (C, R): (in, out), as of a dense kernel

    @property
    def num_bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def native_call(self) -> Call | None:
        """The C++ kernel with which x is multiplied before row scales; None if there is none."""
        call = getattr(_module(self.implementation), "call", None)
        return call and call(self.packed)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., R) in the dtype of x."""
        cols, rows = self.shape
        if x.shape[-1] != cols:
            raise ValueError(f"x has {x.shape[-1]} columns, the quantized weight {cols}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating point, not {x.dtype}; cast it, as to float32")
        y = _module(self.implementation).matmul(x.reshape(-1, cols), self.packed)
        if self.row_scales is not None:
            y = y * self.row_scales.astype(jnp.float32)
        return y.astype(x.dtype).reshape(*x.shape[:-1], rows)


def check_implementation(implementation: str) -> None:
    """Raises ValueError for what is neither 'auto' nor a key of IMPLEMENTATIONS."""
    known = ("auto", *IMPLEMENTATIONS)
    if implementation not in known:
        raise ValueError(f"{implementation=} must be one of {', '.join(known)}")


def check_supported(tensor: QuantizedTensor, implementation: str) -> None:
    """Raises NotImplementedError where an implementation cannot take a tensor on any platform."""
    module = _module(implementation)
    if not isinstance(tensor, getattr(module, "KINDS", (VQTensor,))):
        raise NotImplementedError(f"it has no kernel for {_CODES[type(tensor)]}")
    module.check(tensor.take_row_scales()[0])


def unsupported(tensor: QuantizedTensor, implementation: str) -> str | None:
    """Why an implementation cannot take a tensor on this platform; None if it can."""
    platform = IMPLEMENTATIONS[implementation][0]
    here = jax.default_backend()
    if platform is not None and platform != here:
        return f"it needs a {platform.upper()} and JAX runs on {here.upper()} here"
    try:
        check_supported(tensor, implementation)
    except NotImplementedError as error:
        return str(error)
    return None


def _choose(tensor: QuantizedTensor, implementation: str) -> str:
    if implementation == "auto":
        preferred = _PREFERRED.get(jax.default_backend(), ("xla",))
        preferred = [name for name in preferred if (name, type(tensor)) not in _DOUBTFUL]
        reasons = {name: unsupported(tensor, name) for name in preferred}
        name = next(name for name in preferred if reasons[name] is None)
        passed_over = "".join(f"; not {n}: {why}" for n, why in reasons.items() if why)
        # A cache that can be moved is worth a line to everyone; a missing compiler may be meant.
        say = logging.warning if VARIABLE in passed_over else logging.info
        _say_once(say, f"vq_matmul: auto chose {name} ({IMPLEMENTATIONS[name][1]}){passed_over}")
        return name
    check_implementation(implementation)
    reason = unsupported(tensor, implementation)
    if reason is not None:
        raise NotImplementedError(
            f"vq_matmul implementation {implementation!r} cannot run: {reason}; "
            "use 'xla', which supports every tensor, or 'auto'"
        )
    return implementation


_logged: set[str] = set()


def _say_once(say: Callable[[str], None], message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        say(message)


def _module(implementation: str):
    # Imported on use: kernels for hardware that is not there cost nothing.
    files = {"cpu": "cpu.exact", "cpu_int8": "cpu.int8", "cuda": "cuda.products"}
    name = files.get(implementation, implementation)
    return importlib.import_module(f"gptvq_jax.ops.{name}")
