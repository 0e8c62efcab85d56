"""How many tokens have their logits in memory at once, while something is computed of them."""

from gptvq_jax.models.config import ModelConfig

MOST_TOKENS = 128  # of each text
MOST_BYTES = 1 << 27  # of float32 logits


def head_chunk(config: ModelConfig, batch: int, tables: int = 1) -> int:
    """Tokens of each of `batch` texts whose logits are made together, a power of two.

    A vocabulary of 262,144 tokens leaves 32 of four texts, one of 49,152 all 128.

    Args:
      config: of the model.
      batch: texts.
      tables: arrays of the size of the logits that are there at once, logits and gradient apart.
    """
    size = MOST_TOKENS
    while size > 1 and tables * size * batch * config.vocab_size * 4 > MOST_BYTES:
        size //= 2
    return size


def pair_chunk(config: ModelConfig, batch: int) -> int:
    """Likewise where two models' logits are, their logarithms, and what comes of these."""
    return min(MOST_TOKENS // 4, head_chunk(config, batch, tables=4))


def loss_chunk(config: ModelConfig, batch: int) -> int:
    """Likewise where a gradient goes back through them: large products, whatever the batch.

    A table of embeddings is read five times for each chunk, which less tokens would not be worth.
    """
    size = max(1, 256 // batch)
    while size > 1 and size * batch * config.vocab_size * 4 > MOST_BYTES // 2:
        size //= 2
    return size
