"""KL divergence of a model's next tokens from another's, and its gradient, a few tokens at a time.

Both models are there as what their last blocks leave. The logits of a chunk of tokens are in
memory, forward and backward, before the next chunk starts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import loss_chunk
from gptvq_jax.models.llama import Params, head_logits


@partial(jax.jit, static_argnames=("config", "reference_config"))
def divergence(
    config: ModelConfig,
    head: Params,
    x: jax.Array,
    reference_config: ModelConfig,
    reference_head: Params,
    reference_x: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KL(reference || model) of the next token, summed over all tokens, with its gradients.

    Args:
      config: of the model.
      head: its tree without blocks, as `head_on_device` gives it.
      x: outputs of its last block (batch, T, hidden).
      reference_config, reference_head, reference_x: likewise, of one with the same vocabulary.

    Returns:
      Nats, of each window (batch,); the gradient of their sum with respect to x (batch, T, hidden);
      and that with respect to the scale of the last norm (hidden,).
    """
    batch, time, _ = x.shape
    size = loss_chunk(config, batch)

    def chunks(array):
        array = jnp.pad(array, ((0, 0), (0, -time % size)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(batch, -1, size, *array.shape[2:]), 1, 0)

    def chunk(of_scale, parts):
        counted, x, reference_x = parts
        reference = jax.nn.log_softmax(head_logits(reference_config, reference_head, reference_x))

        def kl(scale, x):
            logits = head_logits(config, {**head, "norm": {"scale": scale}}, x)
            ratio = reference - jax.nn.log_softmax(logits)
            of_tokens = counted * jnp.sum(jnp.exp(reference) * ratio, axis=-1)
            return jnp.sum(of_tokens), jnp.sum(of_tokens, axis=1)

        gradients, of_windows = jax.grad(kl, (0, 1), has_aux=True)(head["norm"]["scale"], x)
        return of_scale + gradients[0], (of_windows, gradients[1])

    counted = jnp.ones((batch, time), x.dtype)
    start = jnp.zeros_like(head["norm"]["scale"])
    of_scale, (sums, dx) = lax.scan(chunk, start, tuple(map(chunks, (counted, x, reference_x))))
    dx = jnp.moveaxis(dx, 0, 1).reshape(batch, -1, x.shape[2])[:, :time]
    return jnp.sum(sums, axis=0), dx, of_scale
