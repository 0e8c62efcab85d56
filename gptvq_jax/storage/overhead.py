"""Bytes of what a checkpoint has beside its arrays."""

from gptvq_jax.models.config import ModelConfig

_TREE_OVERHEAD = 1 << 16  # of the small files of one stored tree, in whole blocks of a disk
_TOKEN_BYTES = 150  # of one token in tokenizer.json, with its merge


def checkpoint_overhead(config: ModelConfig) -> int:
    """Of what a checkpoint has beside its arrays, at most."""
    return config.vocab_size * _TOKEN_BYTES + (config.num_hidden_layers + 2) * _TREE_OVERHEAD
