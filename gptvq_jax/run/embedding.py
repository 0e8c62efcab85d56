"""What stands before the first block and behind the last, sent to the device once for all text.

The table of embeddings stays on the host, where the rows of a batch are picked; a head goes to the
device as a whole, before the first batch that needs it.
"""

import jax
import numpy as np

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Params, scale_embeddings
from gptvq_jax.run.activations import Writer
from gptvq_jax.run.spread import mine


def rows_of(config: ModelConfig, outer: Params, tokens: np.ndarray) -> np.ndarray:
    """Embeddings (..., hidden) of tokens (...), in the table's dtype, on the host.

    Args:
      config: of the model.
      outer: the tree without blocks, of host arrays.
      tokens: ids.

    Raises:
      ValueError: there is no such token.
    """
    table = outer["embed_tokens"]["embedding"]
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(table):
        raise ValueError(
            f"token ids from {tokens.min()} to {tokens.max()} must be within the vocabulary of "
            f"{len(table)}"
        )
    return scale_embeddings(config, np.take(table, tokens, axis=0))


def write_embeddings(config: ModelConfig, outer: Params, tokens: np.ndarray, out: Writer) -> None:
    """Fills `out` (n, T, hidden), the inputs of block 0 on tokens (n, T), a window at a time."""
    own = mine(slice(0, len(tokens)))
    for i in range(own.start, own.stop):
        out[i : i + 1] = rows_of(config, outer, tokens[i : i + 1])


def head_on_device(config: ModelConfig, outer: Params) -> Params:
    """The part of `outer` that `head_logits` and the loss read, on the device.

    Args:
      config: of the model; a tied head is its table of embeddings.
      outer: the tree without blocks, of host arrays.
    """
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return jax.device_put({name: outer[name] for name in ("norm", head)})
