"""Where the parts of a packed checkpoint are, which a run fills block by block.

    manifest.json    written last and atomically: its presence means complete
    tokenizer/       and the other files that transformers reads beside weights, as the source has
                     them, so that export can hand them on
    outer/           a stored tree (tree_io.py): embeddings, final norm and head; the embedding
                     and the head dense, rounded to int8 rows, or quantized as a layer is
    blocks/00000/    one for each transformer block, quantized kernels packed

The manifest holds no dates, so the same run on the same machine writes the same bytes.
"""

from pathlib import Path

FORMAT = "gptvq_jax"
MANIFEST = "manifest.json"


def block_path(directory: Path, index: int) -> Path:
    """The stored tree of block `index`, from 0."""
    return directory / "blocks" / f"{index:05d}"
