"""Makes a packed checkpoint of a model that the aqlm package quantized."""

import math
import os
from collections.abc import Callable

from gptvq_jax.exchange.aqlm_source import AQLMSource
from gptvq_jax.files.new_directory import new_directory
from gptvq_jax.models.shapes import block_shapes, outer_shapes
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter
from gptvq_jax.storage.overhead import checkpoint_overhead
from gptvq_jax.storage.tree_io import DENSE_DTYPES, check_dense_dtype


def import_aqlm(
    source: AQLMSource,
    output_dir: str | os.PathLike,
    dense_dtype: str = "float16",
    on_block: Callable[[], None] = lambda: None,
) -> None:
    """Copies codes, codebooks and scales bit for bit, block by block.

    Float32 and bfloat16 codebooks and scales are rounded to float16. The directory appears under
    its name only when it is whole; an interrupted import starts anew.

    Args:
      source: the model.
      output_dir: new or empty directory.
      dense_dtype: of what is not quantized: 'float16', 'bfloat16' or 'float32'.
      on_block: called after every block.

    Raises:
      ValueError: `output_dir` is in use or cannot be written, a tensor is damaged, or a value
        overflows its dtype.
      FullDiskError: there is no room; nothing is left then.
    """
    check_dense_dtype(dense_dtype)
    with new_directory(output_dir, _num_bytes(source, dense_dtype)) as partial:
        writer = CheckpointWriter(partial, dense_dtype)
        writer.write_tokenizer(source.tokenizer, source.companions())
        writer.write_outer(source.outer())
        for index in range(source.config.num_hidden_layers):
            writer.write_block(index, source.packed_block(index))
            on_block()
        made_by = {"imported_from": "hf-aqlm", "model": source.name, "dense_dtype": dense_dtype}
        writer.finalize(made_by, source.config, source.name, source.fingerprint)


def _num_bytes(source: AQLMSource, dense_dtype: str) -> int:
    """Of the checkpoint, at most."""
    config, (books, bits, dim) = source.config, source.format
    item = DENSE_DTYPES[dense_dtype].itemsize
    size = sum(map(math.prod, outer_shapes(config).values())) * item
    for index in range(config.num_hidden_layers):
        for name, shape in block_shapes(config.of_block(index)).items():
            if source.is_quantized(f"model.layers.{index}.{name}"):
                rows, cols = shape
                size += books * (rows * -(-cols // dim * bits // 8) + 2**bits * dim * 2) + rows * 2
            else:
                size += math.prod(shape) * item
    return size + checkpoint_overhead(config)
