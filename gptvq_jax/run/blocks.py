"""The blocks of a model on the device, one after another."""

from collections.abc import Iterator, Sequence

import jax

from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.models.llama import Params
from gptvq_jax.models.source import ModelSource


class Blocks:
    """Iterates over (index, block), each block in float32 on the device.

    Args:
      source: of the blocks.
      order: their indices.
      stopwatch: receives the seconds that are waited for them, as stage "load block".
    """

    def __init__(self, source: ModelSource, order: Sequence[int], stopwatch: Stopwatch):
        self._source, self._order, self._stopwatch = source, order, stopwatch

    def __iter__(self) -> Iterator[tuple[int, Params]]:
        for index in self._order:
            with self._stopwatch.stage("load block"):
                block = jax.device_put(self._source.block(index))
            yield index, block
