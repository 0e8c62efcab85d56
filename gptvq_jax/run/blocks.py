"""The blocks of a model on the device, one after another, the next one read meanwhile."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import jax

from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.models.llama import Params
from gptvq_jax.models.source import ModelSource


class Blocks:
    """Iterates over (index, block), each block in float32 on the device.

    A thread reads the block after the one that is in use, so that two are in memory. What it raises
    is raised here when that block's turn comes. It ends with the iteration, also with one that is
    left early.

    Args:
      source: of the blocks; nothing else may use it meanwhile.
      order: their indices.
      stopwatch: receives the seconds that are waited for them, as stage "load block".
    """

    def __init__(self, source: ModelSource, order: Sequence[int], stopwatch: Stopwatch):
        self._source, self._order, self._stopwatch = source, order, stopwatch

    def __iter__(self) -> Iterator[tuple[int, Params]]:
        with ThreadPoolExecutor(1, "load block") as thread:
            ahead = None
            for index, after in zip_longest(self._order, self._order[1:]):
                with self._stopwatch.stage("load block"):
                    block = (ahead or thread.submit(self._load, index)).result()
                ahead = None if after is None else thread.submit(self._load, after)
                yield index, block
                del block

    def _load(self, index: int) -> Params:
        return jax.block_until_ready(self._source.block(index))
