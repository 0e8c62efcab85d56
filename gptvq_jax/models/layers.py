"""Layers with weights: norm, linear layer, embedding. The last two take packed leaves."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True)}


def precision(*dtypes: Any) -> str | None:
    """Of a product of such operands: float32 is multiplied as float32, on every kind of device.

    By default an accelerator would round float32 operands first, to bfloat16 or to TF32; bfloat16
    and float16 are multiplied as they are in any case.
    """
    return "highest" if jnp.result_type(*dtypes) == jnp.float32 else None


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), which stays within (-cap, cap); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class RMSNorm(nn.Module):
    """x / rms(x) * (scale + offset) over the last axis, with the statistics in float32."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],))
        if self.offset:
            scale = scale.astype(jnp.float32) + self.offset
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype) * scale.astype(x.dtype)


def is_dense(weight: Any) -> bool:
    """Whether a weight is an array, not one that multiplies by itself."""
    return isinstance(weight, (jax.Array, np.ndarray))


def multiply(
    x: jax.Array, kernel: Any, features: int, out_dtype: Any = None, name: str | None = None
) -> jax.Array:
    """x (..., in) @ kernel, an array (in, features) or a pytree that implements it.

    Args:
      x: inputs.
      kernel: of the layer.
      features: of the outputs.
      out_dtype: of the outputs; None: the dtype of x.
      name: of the layer, for the message.

    Raises:
      ValueError: the kernel is an array of another shape.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if not is_dense(kernel):
        return x.astype(out_dtype) @ kernel
    if kernel.shape != (x.shape[-1], features):
        raise ValueError(
            f"kernel of {name} has shape {kernel.shape}, but (in, out) must be "
            f"{(x.shape[-1], features)}"
        )
    return jnp.matmul(
        x,
        kernel.astype(x.dtype),
        precision=precision(x.dtype),
        preferred_element_type=out_dtype,
    )


class Linear(nn.Module):
    """Dense layer, (..., in) -> (..., features), which sows its input as "inputs".

    Its kernel is an array (in, features), or any pytree that implements `x @ kernel` through
    `__rmatmul__`: a quantized layer replaces a dense one by replacing this leaf.
    Sowing is free unless the collection "intermediates" is mutable. A variable "outputs" in the
    collection "perturbations", in the shape of the outputs, is added to them: the gradient with
    respect to it, at 0, is the gradient with respect to the outputs.

    Raises:
      ValueError: the kernel is an array of another shape.
    """

    features: int
    out_dtype: Any = None  # None: the dtype of x
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow("intermediates", "inputs", x)
        if self.has_variable("params", "kernel"):
            # Not self.param, which insists on the shape of a dense kernel.
            kernel = self.get_variable("params", "kernel")
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        y = multiply(x, kernel, self.features, self.out_dtype, self.name)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        # Not self.perturb, with which init would return a collection of zeros.
        if self.has_variable("perturbations", "outputs"):
            y = y + self.get_variable("perturbations", "outputs")
        return y


class Embedding(nn.Module):
    """Vectors of tokens, (batch, time) int -> (batch, time, features).

    Its embedding is an array (vocab, features), or any pytree that implements `take(tokens)` and,
    for a tied head, `x @ embedding` through `__rmatmul__`.
    """

    vocab_size: int
    features: int

    def setup(self):
        if self.has_variable("params", "embedding"):
            # Not self.param, which insists on the shape of a dense embedding.
            self.embedding = self.get_variable("params", "embedding")
        else:
            shape = (self.vocab_size, self.features)
            self.embedding = self.param("embedding", nn.initializers.normal(), shape)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return look_up(self.embedding, tokens)

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of all tokens, (batch, time, features) -> (batch, time, vocab) float32."""
        if is_dense(self.embedding):
            table = self.embedding.astype(x.dtype)
            return jnp.einsum(
                "bth,vh->btv",
                x,
                table,
                precision=precision(x.dtype),
                preferred_element_type=jnp.float32,
            )
        return x.astype(jnp.float32) @ self.embedding


def look_up(table: Any, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding; NaN for a token outside the vocabulary, not another token's vector."""
    if is_dense(table):
        return jnp.take(table, tokens, axis=0)
    return table.take(tokens)
