"""Bytes of what a checkpoint has beside its arrays."""

from gptvq_jax.models.config import ModelConfig

_TREE_OVERHEAD = 1 << 16  # of the small files of one stored tree, in whole blocks of a disk
_LAYER_OVERHEAD = 1 << 13  # of the descriptions of a layer of an expert, of which there are many
_TOKEN_BYTES = 150  # of one token in tokenizer.json, with its merge


def checkpoint_overhead(config: ModelConfig) -> int:
    """Of what a checkpoint has beside its arrays, at most."""
    size = config.vocab_size * _TOKEN_BYTES + (config.num_hidden_layers + 2) * _TREE_OVERHEAD
    counts = config.block_counts().items()
    layers = sum(count * len(block.linear_layers) for block, count in counts if block.experts)
    return size + layers * _LAYER_OVERHEAD
