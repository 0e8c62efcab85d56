"""The walk over a model's blocks: one in memory at a time, activations in files between them.

A pass over the model is a visitor. It finds streams (stream_store.py) at the entrance of a block,
leaves others at its exit, and says after a kill how far it had come. Visitors that go the same way
share a walk, so that a block is loaded once for all of them; they visit it in their order.

What is on disk when: a visit writes the streams at the exit first, and last what makes the block
count as done. What the last reader of a stream has passed is dropped, but for the entrance of the
block that was just done, which is made again from it where it is found damaged.
"""

from collections.abc import Sequence
from typing import Protocol

from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.models.llama import Params
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.blocks import Blocks
from gptvq_jax.run.stream_store import StreamStore


class Visitor(Protocol):
    """A pass over the blocks.

    Attributes:
      files: hold its streams.
      releases: those that nobody reads behind this visitor.
    """

    files: StreamStore
    releases: Sequence[str]

    def position(self, order: range) -> int:
        """How many blocks of the order are done, as the files say; those are not visited."""
        ...

    def begin(self) -> None:
        """Makes what the first block of the order finds at its entrance, unless it is there."""
        ...

    def visit(self, index: int, block: Params) -> None:
        """Does its work on block `index`, given in float32 on the device."""
        ...


def walk(
    source: ModelSource,
    visitors: Sequence[Visitor],
    order: range,
    stopwatch: Stopwatch,
    progress: Progress | None = None,
) -> None:
    """Takes visitors through blocks, each from where it was.

    Args:
      source: of the blocks.
      visitors: in the order in which they visit a block.
      order: of the blocks, up or down.
      stopwatch: receives the seconds that are waited for blocks.
      progress: of blocks, which the walk counts; those that are done already are skipped.
    """
    positions = [visitor.position(order) for visitor in visitors]
    if progress is not None:
        progress.skip(min(positions))
    for visitor, position in zip(visitors, positions, strict=True):
        if position == 0 and len(order):
            visitor.begin()
    left = order[min(positions, default=len(order)) :]
    for index, block in Blocks(source, left, stopwatch):
        for visitor, position in zip(visitors, positions, strict=True):
            if order.index(index) >= position:
                visitor.visit(index, block)
        for visitor in visitors:
            for stream in visitor.releases:
                visitor.files.drop_behind(stream, entrance(index, order), order.step)
        if progress is not None:
            progress.advance(f"block {index}")
    for visitor in visitors:
        for stream in visitor.releases:
            visitor.files.drop(stream)


def entrance(index: int, order: range) -> int:
    """The point where a walk enters a block: point i lies before block i."""
    return index if order.step > 0 else index + 1
