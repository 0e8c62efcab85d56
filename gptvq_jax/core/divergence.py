"""How far one distribution of the next token is from another, token by token."""

import jax
import jax.numpy as jnp

FIGURES = ("nll", "nll_reference", "kl", "same_top1")  # of a token; the last is 0 or 1


def token_figures(logits: jax.Array, reference: jax.Array, targets: jax.Array) -> jax.Array:
    """What two models say of the same tokens.

    With p the reference's distribution and q the model's, KL(p || q) = sum p (log p - log q). Both
    sum to 1, so that it is also sum p (q/p - 1 - log q/p), of terms that are not negative: what is
    rounded in log q/p counts times q/p - 1, and two models that hardly differ have a KL divergence
    that is right to more than its sign.

    Args:
      logits: of the model (..., vocab).
      reference: logits of the other one, likewise.
      targets: the tokens that came (...).

    Returns:
      float32 (..., 4), FIGURES: negative log-likelihood of the target in nats, by the model and by
      the reference, KL(reference || model) in nats, and whether both have the same likeliest token.
    """
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_p = jax.nn.log_softmax(reference.astype(jnp.float32))
    nll, nll_reference = (
        -jnp.take_along_axis(log_of, targets[..., None], axis=-1)[..., 0]
        for log_of in (log_q, log_p)
    )
    p, ratio = jnp.exp(log_p), log_q - log_p
    near = jnp.abs(ratio) < 1
    beyond = jnp.exp(log_q) - p - p * ratio  # where exp(ratio) may overflow
    close = p * (jnp.expm1(jnp.where(near, ratio, 0.0)) - ratio)
    kl = jnp.sum(jnp.where(near, close, beyond), axis=-1)
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(reference, axis=-1)
    return jnp.stack([nll, nll_reference, kl, same.astype(jnp.float32)], axis=-1)
