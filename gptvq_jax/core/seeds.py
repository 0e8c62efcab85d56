"""Seeds of random numbers."""

import jax

LARGEST_SEED = 2**32 - 1  # JAX drops the bits above these


def random_key(seed: int) -> jax.Array:
    """The key of a seed.

    Raises:
      ValueError: JAX would take the seed for another one.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed={seed} must be from 0 to {LARGEST_SEED}")
    return jax.random.key(seed)
