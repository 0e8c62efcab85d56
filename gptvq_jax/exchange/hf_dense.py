"""Writes a packed checkpoint as a dense model that transformers and most other tools load."""

import os
from collections.abc import Callable

from gptvq_jax.adapters.adapter import Adapter, merged
from gptvq_jax.exchange.hf_layout import write_model
from gptvq_jax.models.llama import Params
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.dequantize import dequantize_tree


def hf_dense(
    checkpoint: PackedCheckpoint,
    output_dir: str | os.PathLike,
    dtype: str = "float32",
    shard_bytes: int = 2 * 10**9,
    on_block: Callable[[], None] = lambda: None,
    adapter: Adapter | None = None,
) -> None:
    """Writes the dequantized model in Hugging Face's layout: config, safetensors, tokenizer.

    The other files that transformers reads with a model go along, as the source had them.

    Blocks are streamed; memory holds a block and a shard. The directory appears under its name only
    when it is whole.

    Args:
      checkpoint: a complete one.
      output_dir: new or empty directory.
      dtype: 'float32' (exact), 'float16' or 'bfloat16'.
      shard_bytes: size of a file, at most, unless one tensor is larger.
      on_block: called after every block.
      adapter: of the model, merged into the weights; None: none.

    Raises:
      ValueError: `output_dir` is in use or cannot be written, or a weight overflows `dtype`.
      FullDiskError: there is no room; nothing is left then.
    """

    def block(index: int) -> Params:
        block = dequantize_tree(checkpoint.packed_block(index))
        return block if adapter is None else merged(block, adapter.of_block(index))

    write_model(checkpoint, output_dir, {}, block, dtype, shard_bytes, on_block)
