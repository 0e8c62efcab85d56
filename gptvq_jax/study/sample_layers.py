"""Layers to measure methods on: of a real model with real inputs, or random of any size."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.console.progress import Progress
from gptvq_jax.core.hessian import Moment, add_inputs, init_moment, mean
from gptvq_jax.data import calibration_windows, documents, evaluation_windows
from gptvq_jax.files.new_directory import new_directory
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Params, block_forward_with_inputs, embed, get_layer
from gptvq_jax.models.open import PACKAGED_SMOLLM2, open_source
from gptvq_jax.models.source import ModelSource, layer_shapes
from gptvq_jax.models.stages import expert_of

# From the first, middle and last block of SmolLM2-135M; together every kind of input and shape.
SAMPLED_LAYERS = {
    0: ("self_attn/k_proj",),
    14: ("mlp/down_proj", "self_attn/o_proj", "mlp/up_proj", "self_attn/v_proj"),
    29: ("self_attn/q_proj",),
}
_BATCH_SIZE = 4  # windows per forward pass


def smollm2_layers(directory: Path, *, num_windows: int = 8, seqlen: int = 1024) -> None:
    """Writes SAMPLED_LAYERS of SmolLM2-135M to a directory, unless it is already there.

    The Hessians are those of the float model on random windows of the Wikipedia articles, and, to
    be held out, on as many windows of other articles.

    Args:
      directory: to be made; see `make_layers`.
      num_windows, seqlen: of the text.

    Raises:
      FileNotFoundError: the package with the model or the one with the text is not installed.
    """
    if directory.exists():
        return
    source = open_source(PACKAGED_SMOLLM2)
    tokens = calibration_windows(
        source.tokenizer,
        documents("wikipedia", "train"),
        num_windows,
        seqlen,
        seed=0,
        vocab_size=source.config.vocab_size,
    )
    others = evaluation_windows(
        source.tokenizer,
        documents("wikipedia", "test"),
        seqlen,
        num_windows,
        vocab_size=source.config.vocab_size,
    )
    with Progress(max(SAMPLED_LAYERS) + 1, "sample layers", "block") as progress:
        make_layers(source, tokens, SAMPLED_LAYERS, directory, progress, held_out=others)


def make_layers(
    source: ModelSource,
    tokens: np.ndarray,
    wanted: Mapping[int, Sequence[str]],
    directory: Path,
    progress: Progress,
    held_out: np.ndarray | None = None,
) -> None:
    """Writes weights and Hessians of some layers of the float model, one .npz file per layer.

    `block07.k_proj.npz` holds `weight` (out, in) and `hessian` (in, in), mean x x^T, float32, and
    where there is a second text its Hessian as `held_out`. One
    block is in memory at a time, and none after the last one wanted is read. The directory appears
    only when it is complete; one that exists is left as it is.

    Args:
      source: the model.
      tokens: windows (n, T) int32.
      wanted: {block: names of its linear layers}.
      directory: to be made.
      progress: advanced by one per block up to the last one wanted.
      held_out: windows (n, T) int32 of the second text.

    Raises:
      ValueError: a layer or a block that the model does not have.
    """
    if directory.exists():
        return
    depth = source.config.num_hidden_layers
    if not wanted or not 0 <= min(wanted) <= max(wanted) < depth:
        raise ValueError(f"blocks {sorted(wanted)} must be some of 0 to {depth - 1}")
    weights = []
    for index, names in wanted.items():
        shapes = layer_shapes(source.config.of_block(index))
        for name in names:
            if name not in shapes or expert_of(name) is not None:
                known = tuple(name for name in shapes if expert_of(name) is None)
                raise ValueError(
                    f"{name!r} is not a linear layer of a block that all tokens meet; choose from "
                    f"{known}"
                )
            weights.append(shapes[name])
    texts = {"hessian": tokens} if held_out is None else {"hessian": tokens, "held_out": held_out}
    num_bytes = sum(4 * cols * (rows + len(texts) * cols) for rows, cols in weights)
    with new_directory(directory, num_bytes) as partial:
        outer = source.outer()
        activations = {
            text: np.asarray(embed(source.config, outer, of_text))
            for text, of_text in texts.items()
        }
        for index in range(max(wanted) + 1):
            block, config = jax.device_put(source.block(index)), source.config.of_block(index)
            names, moments = wanted.get(index, ()), {}
            for text, x in activations.items():
                activations[text], moments[text] = _forward(config, block, x, names)
            for name in names:
                group = config.layers.first_of[name]
                np.savez(
                    partial / f"block{index:02d}.{name.rpartition('/')[2]}.npz",
                    weight=np.asarray(get_layer(block, name)["kernel"]).T,
                    **{text: np.asarray(mean(of[group])) for text, of in moments.items()},
                )
            progress.advance(f"block {index}")


def _forward(
    config: ModelConfig, block: Params, activations: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, dict[str, Moment]]:
    """Outputs (n, T, hidden) on the host, and the moments of what the layers named read."""
    first_of = config.layers.first_of
    moments = {first_of[n]: init_moment(get_layer(block, n)["kernel"].shape[0]) for n in names}
    outputs = np.empty_like(activations)
    for start in range(0, len(activations), _BATCH_SIZE):
        part = slice(start, start + _BATCH_SIZE)
        outputs[part], inputs = block_forward_with_inputs(config, block, activations[part])
        moments = {group: add_inputs(m, inputs[group]) for group, m in moments.items()}
    return outputs, moments


def random_layer(rows: int, cols: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """A weight (R, C) with outlier columns and the Hessian (C, C) of correlated inputs.

    One column in 64 is 8 times as large as the others. H is a matrix of rank C / 16 plus a
    diagonal of uneven size, trace C.
    """
    generator = np.random.default_rng(seed)
    columns = np.where(generator.permutation(cols) % 64 == 0, np.float32(8), np.float32(1))
    rank = -(-cols // 16)
    factor = generator.standard_normal((cols, rank), np.float32) / np.float32(np.sqrt(rank))
    size = np.exp(generator.standard_normal(cols, np.float32))
    factor *= np.sqrt(size)[:, None]
    hessian = factor @ factor.T
    hessian[np.diag_indices(cols)] += 0.1 * size
    hessian *= cols / np.trace(hessian)
    # Changed in place and handed over one after the other: few copies in memory at once.
    hessian = jax.block_until_ready(jnp.asarray(hessian))
    weight = generator.standard_normal((rows, cols), np.float32)
    weight *= columns
    return jnp.asarray(weight), hessian
