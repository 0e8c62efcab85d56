"""The quantizing pass: one transformer block after another becomes packed.

For each block: the Hessians of its layers on what the quantized model has made of the calibration
text, the layers quantized and their errors measured, also on the windows that are held out, the
block tuned where that is asked for, written packed, the activations taken through it, and the block
dropped. With `true_sequential` the block is gone through once, in stages: what a stage's layers
read comes from the quantized layers before them. Otherwise all layers see the float layers of their
block, which is gone through a second time once they are quantized.

Device memory holds one block, its Hessians and a batch; host memory a block, and activations are
on disk. Memory grows neither with depth nor with the calibration tokens.
"""

import numpy as np

from gptvq_jax.config import to_dict
from gptvq_jax.models.llama import Params
from gptvq_jax.run import forward
from gptvq_jax.run.context import Context
from gptvq_jax.run.embedding import write_embeddings
from gptvq_jax.run.formats import Plan, dense_layers, num_quantized
from gptvq_jax.run.outer import stored_outer
from gptvq_jax.run.packed_block import STREAM, PackedBlock, drop_inside
from gptvq_jax.run.workdir import TUNE_KINDS
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter
from gptvq_jax.storage.dequantize import dequantize_tree


class Quantize:
    """A visitor of the blocks, upwards: writes the packed checkpoint but for its manifest.

    Args:
      context: of the run.
      tokens: calibration windows (n, T).
      plan: settings of layers that a budget had a say in.
    """

    def __init__(self, context: Context, tokens: np.ndarray, plan: Plan):
        self._context, self._tokens, self._plan = context, tokens, plan
        self.files = context.files
        settings = context.settings
        self.writer = CheckpointWriter(context.workdir.quantized, settings.dense_dtype)
        self.finished = self.writer.finished_blocks()
        self._last = num_quantized(settings, context.source.config)
        self._float_inputs = settings.calibration.inputs == "float"
        self.releases = (STREAM, forward.STREAM, forward.MIDDLE)

    def position(self, order: range) -> int:
        """Blocks of the checkpoint; what a killed run has left of the next one is dropped."""
        files = self._context.files
        files.drop(STREAM, keep=range(self.finished + 1))
        drop_inside(files)
        workdir = self._context.workdir
        kinds = ("outer", "layer", "block", *TUNE_KINDS)
        rows = [row for row in workdir.metrics() if row["kind"] in kinds]
        # Those of the embedding and the head come before block 0, which counts when it is written.
        workdir.keep_metrics([row for row in rows if row.get("block", 0) < self.finished])
        if self.finished:
            self._mend()
        return self.finished

    def begin(self) -> None:
        """Stores what is outside the blocks, and embeds the tokens as the model will."""
        source, _, workdir, _, stopwatch = self._context
        with stopwatch.stage("embed"):
            stored, rows = stored_outer(self._context, source.outer())
            self.writer.write_outer(stored)
            workdir.append_metrics(rows)
            self.writer.write_tokenizer(source.tokenizer, source.companions())
            if self._float_inputs:
                return
            shape = (*self._tokens.shape, source.config.hidden_size)
            with self._context.files.write(STREAM, 0, shape) as out:
                write_embeddings(source.config, dequantize_tree(stored), self._tokens, out)

    def finalize(self) -> None:
        """Completes the checkpoint."""
        source = self._context.source
        self.writer.finalize(
            config=to_dict(self._context.settings),
            model_config=source.config,
            source_name=source.name,
            source_fingerprint=source.fingerprint,
            kept_dense=dense_layers(self._context.settings, source.config),
        )

    def _mend(self) -> None:
        """Stores again, before hours of work, what was damaged of what `begin` stored."""
        source = self._context.source
        self.writer.write_tokenizer(source.tokenizer, source.companions())
        if not self.writer.has_outer():
            self.writer.write_outer(stored_outer(self._context, source.outer())[0])

    def visit(self, index: int, block: Params) -> None:
        """Writes the block last."""
        _, settings, workdir, progress, stopwatch = self._context
        packed, rows = block, []
        if index < self._last:
            packed, rows = PackedBlock(self._context, self._plan, index, block).quantized(
                goes_on=index + 1 < self._last
            )
        else:
            progress.note(f"block {index} stays dense")
        with stopwatch.stage("save"):
            workdir.append_metrics(rows)
            self.writer.write_block(index, packed)
