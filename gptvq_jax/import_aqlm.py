"""Makes a packed checkpoint of a model that the aqlm package quantized."""

import os
from collections.abc import Callable

from gptvq_jax.checkpoint import CheckpointWriter
from gptvq_jax.models.aqlm_source import AQLMSource
from gptvq_jax.new_directory import new_directory


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
    """
    with new_directory(output_dir) as partial:
        writer = CheckpointWriter(partial, dense_dtype)
        writer.write_tokenizer(source.tokenizer, source.companions())
        writer.write_outer(source.outer())
        for index in range(source.config.num_hidden_layers):
            writer.write_block(index, source.packed_block(index))
            on_block()
        made_by = {"imported_from": "hf-aqlm", "model": source.name, "dense_dtype": dense_dtype}
        writer.finalize(made_by, source.config, source.name, source.fingerprint)
