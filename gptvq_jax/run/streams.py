"""Calibration activations from block to block, in the quantized and in the float model.

They are kept in the work directory. The float model's are there only where something is compared
with them: an asymmetric target, or tuning.
"""

from contextlib import AbstractContextManager, nullcontext

import numpy as np

from gptvq_jax.config import RunSettings
from gptvq_jax.models.llama import Params
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run.activations import Activations, Writer, num_bytes
from gptvq_jax.run.calibrate import advance
from gptvq_jax.run.embedding import write_embeddings
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.storage.checkpoint import dequantize_tree


class Streams:
    """Reads and writes the activations (n, T, hidden) at the entrance of each block.

    Args:
      source: the float model.
      settings: of the run.
      workdir: opened with these settings.
    """

    def __init__(self, source: ModelSource, settings: RunSettings, workdir: WorkDir):
        c = settings.calibration
        self._source, self._workdir = source, workdir
        self._batch_size = c.batch_size
        self._float_inputs = c.inputs == "float"
        self._tunes = settings.tune.block
        self._has_float = c.asymmetry > 0 or settings.tune.block

    def peak_bytes(self, shape: tuple[int, int], finished: int, last: int) -> int:
        """Most bytes of all streams at once, from now on.

        A stream has the inputs of the last finished block, of the one at work and of the next.

        Args:
          shape: of the tokens (n, T).
          finished: blocks that are done.
          last: blocks that are quantized; those after them are not calibrated.
        """
        if finished >= last:
            return 0
        inputs = last - max(0, finished - 1)  # blocks whose inputs there will be
        count = min(3, inputs)
        if self._has_float:  # of the last block the outputs are there only to tune towards
            count += min(3, inputs + self._tunes)
        return count * (num_bytes((*shape, self._source.config.hidden_size)) + 128)  # a header

    def begin(self, outer: Params, stored: Params, tokens: np.ndarray) -> None:
        """Embeds the tokens (n, T), with the float model's table and with the one that is stored.

        Args:
          outer, stored: parameters outside the blocks, as given to and as got from
            `CheckpointWriter.write_outer`.
          tokens: calibration windows.
        """
        shape = (*tokens.shape, self._source.config.hidden_size)
        if self._has_float:
            with self._workdir.write_activations(0, shape, "float") as out:
                write_embeddings(outer, tokens, out)
        table = outer if self._float_inputs else dequantize_tree(stored)
        with self._workdir.write_activations(0, shape) as out:
            write_embeddings(table, tokens, out)

    def quantized(self, block: int) -> Activations:
        """In the model as far as it is quantized, or with calibration.inputs 'float' is to be."""
        return self._workdir.load_activations(block)

    def float(self, block: int) -> Activations | None:
        """In the float model, where they are kept apart."""
        return self._workdir.load_activations(block, "float") if self._has_float else None

    def float_outputs(self, block: int) -> AbstractContextManager[Writer | None]:
        """Where the outputs of the float block go, if anything reads them."""
        if not (self._has_float or self._float_inputs):
            return nullcontext()
        stream = "float" if self._has_float else "quantized"
        return self._workdir.write_activations(block + 1, self.quantized(block).shape, stream)

    def advance(self, block: int, params: Params) -> None:
        """Takes the quantized stream through a block, given as it was quantized."""
        if self._float_inputs:  # float_outputs has it
            return
        inputs = self.quantized(block)
        with self._workdir.write_activations(block + 1, inputs.shape) as out:
            advance(self._source.config, params, inputs, self._batch_size, out)
