"""Random models in Hugging Face's format: a shape without a mind, for benchmarks.

A tensor depends on the seed, its name and its shape alone, and is written a few rows at a time.
"""

import dataclasses
import functools
import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.shapes import block_shapes, fused_place, outer_shapes
from gptvq_jax.storage.shard_stream import Slot, stream_bytes, write_stream

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PIECE_VALUES = 2**22
_CLOSING = ("o_proj.weight", "down_proj.weight", "w2.weight")  # what is added to x

Slots = dict[str, Slot]


@dataclasses.dataclass(frozen=True)
class Weights:
    """How they are drawn.

    Attributes:
      seed: of all of them.
      tail: exponent of the power law of a matrix's column scales, whose mean square is 1: the
        smaller, the more a few columns stand out; 0: all columns alike.
      norm_spread: standard deviation of norm scales around 1.
      depth: blocks, by the root of which what adds to x is made smaller; 0: it is not.
    """

    seed: int = 0
    tail: float = 0.0
    norm_spread: float = 0.0
    depth: int = 0

    def pieces(self, config: ModelConfig, slots: Slots) -> Iterator[tuple[str, np.ndarray]]:
        """(name, values) for `write_stream`."""
        for name, slot in slots.items():
            draw = self._matrix if len(slot.shape) == 2 else self._vector
            yield from ((name, part) for part in draw(config, name, slot.shape))

    def _matrix(self, config, name, shape) -> Iterator[np.ndarray]:
        del config
        generator = self._generator(name)
        rows, cols = shape
        scales = np.full(cols, 1 / math.sqrt(cols), np.float32)
        if self.tail:
            tails = generator.pareto(self.tail, cols) + 1
            scales *= (tails / np.sqrt(np.mean(np.square(tails)))).astype(np.float32)
        if self.depth and name.endswith(_CLOSING):
            scales /= math.sqrt(2 * self.depth)
        step = max(1, _PIECE_VALUES // cols)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            values = generator.standard_normal((count, cols), dtype=np.float32)
            yield (values * scales).astype(BFLOAT16)

    def _vector(self, config, name, shape) -> Iterator[np.ndarray]:
        values = self._generator(name).standard_normal(shape) * self.norm_spread
        if not name.endswith(".bias"):
            values += 1 - config.family.norm_offset
        yield values.astype(BFLOAT16)

    def _generator(self, name: str) -> np.random.Generator:
        of_name = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        return np.random.default_rng([self.seed, of_name])


def block_slots(config: ModelConfig, index: int) -> Slots:
    """What the file of a block holds; weights that the family stores fused are."""
    slots: Slots = {}
    block = config.of_block(index)
    for name, shape in block_shapes(block).items():
        full = f"model.layers.{index}.{name}"
        home, _, rows = fused_place(block, full, shape)
        slots[home] = Slot((rows, *shape[1:]), BFLOAT16)
    return slots


def outer_slots(config: ModelConfig) -> Slots:
    """What the file of all that is outside the blocks holds."""
    return {name: Slot(shape, BFLOAT16) for name, shape in outer_shapes(config).items()}


def files(config: ModelConfig, single: bool = False) -> dict[str, Slots]:
    """{name of a file: what it holds}: one for each block and one for the rest, or a `single`."""
    if single:
        blocks = (block_slots(config, index) for index in range(config.num_hidden_layers))
        return {"model.safetensors": functools.reduce(operator.or_, blocks, outer_slots(config))}
    count = config.num_hidden_layers + 1
    parts = [outer_slots(config), *(block_slots(config, i) for i in range(count - 1))]
    return {f"model-{i:05d}-of-{count:05d}.safetensors": part for i, part in enumerate(parts, 1)}


def model_bytes(config: ModelConfig) -> int:
    """Of all files of weights."""
    return sum(map(stream_bytes, files(config).values()))


def write_weights(
    directory: Path,
    config: ModelConfig,
    weights: Weights,
    on_file: Callable[[str, int], None] = lambda name, num_bytes: None,
    single: bool = False,
) -> None:
    """Writes the files of weights that are not there yet, and then their index, if they need one.

    Args:
      directory: exists.
      config: of the model.
      weights: how they are drawn.
      on_file: called when a file is there, with its name and bytes.
      single: whether it is one file.

    Raises:
      FullDiskError: the disk is full.
    """
    weight_map, total = {}, 0
    for name, slots in files(config, single).items():
        path = directory / name
        if not path.exists():
            write_stream(path, slots, weights.pieces(config, slots))
        on_file(name, stream_bytes(slots))
        weight_map |= dict.fromkeys(slots, name)
        total += sum(slot.num_bytes for slot in slots.values())
    if single:
        return
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def config_text(config: ModelConfig) -> str:
    """config.json of such a model."""
    return json.dumps({**config.to_hf(), "torch_dtype": "bfloat16"}, indent=2) + "\n"


def write_random_llama(
    directory: Path,
    tokenizer,
    num_blocks: int,
    hidden: int,
    head_dim: int = 64,
    seed: int = 0,
    wide: int | None = None,
    vocab_size: int | None = None,
) -> None:
    """Writes a small Llama with Gaussian weights, bfloat16, and the tokenizer files.

    Args:
      directory: is made.
      tokenizer: a transformers tokenizer, or None where no text is read.
      num_blocks: depth.
      hidden: width, a multiple of head_dim.
      head_dim: of an attention head.
      seed: of the weights.
      wide: width of the feed-forward layers, by default 8/3 of `hidden`.
      vocab_size: by default the tokenizer's.
    """
    if hidden % head_dim:
        raise ValueError(f"{hidden=} must be a multiple of {head_dim=}")
    directory.mkdir(parents=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    config = ModelConfig(
        model_type="llama",
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=wide or hidden * 8 // 3,
        num_hidden_layers=num_blocks,
        num_attention_heads=hidden // head_dim,
        num_key_value_heads=hidden // head_dim,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    write_weights(directory, config, Weights(seed), single=True)
    (directory / "config.json").write_text(config_text(config))


def shortened(hf: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """The fields of a config.json, of a model of fewer blocks.

    Args:
      hf: of the whole model.
      blocks: that are left, from the first; 0: all.

    Raises:
      ValueError: it has not so many.
    """
    depth = hf.get("num_hidden_layers")
    if not blocks or not isinstance(depth, int):
        return dict(hf)
    if not 0 < blocks <= depth:
        raise ValueError(f"--blocks={blocks} must be from 1 to {depth}, the blocks of the model")
    short = {
        name: value[:blocks] if isinstance(value, list) and len(value) == depth else value
        for name, value in hf.items()
    }
    return {**short, "num_hidden_layers": blocks}
