"""The model that a command serves: which one its flags name, and the weights that it runs on."""

from pathlib import Path

from gptvq_jax.adapters.adapter import beside
from gptvq_jax.adapters.peft_files import open_adapter
from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import ModelSource
from gptvq_jax.serve import int8_effect
from gptvq_jax.serve.huge_pages import on_huge_pages
from gptvq_jax.serve.params import Params, dense_params, packed_params
from gptvq_jax.storage.checkpoint import PackedCheckpoint


class ServedModel:
    """A checkpoint, packed or dequantized, or a float model; its weights are not read yet.

    Args:
      checkpoint, model: exactly one of them: a checkpoint directory, or a model as in config.model.
      implementation: of products with packed weights, see `ops.vq_matmul`; None: 'auto', which
        on a CPU may be `cpu_int8` (int8_effect.py).
      dense: replace a checkpoint's packed weights by the dense ones that they stand for.
      adapter: directory of an adapter in PEFT's format, kept beside the weights; None: none.
      exact: 'auto' does not take `cpu_int8`, whatever its effect.

    Attributes:
      source: config, tokenizer, stop tokens.
      bits_per_value: of the quantized layers of a checkpoint; None: of a float model.
      adapter: that of the directory, or None.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: bad input, in one line with the way out.
    """

    def __init__(
        self,
        checkpoint: str | None,
        model: str | None,
        implementation: str | None = None,
        dense: bool = False,
        adapter: str | None = None,
        exact: bool = False,
    ):
        if (checkpoint is None) == (model is None):
            raise ValueError("pass either --checkpoint=DIR or --model=NAME")
        self._packed = checkpoint is not None and not dense
        if implementation is not None and not self._packed:
            raise ValueError(
                "--implementation is of packed weights; leave it out with --model or --dense"
            )
        if dense and model is not None:
            raise ValueError("--dense is of a checkpoint; a --model is dense already")
        self._implementation, self._exact = implementation or "auto", exact
        self.source: ModelSource
        self.bits_per_value: float | None = None
        if checkpoint is None:
            self.source = open_source(model)
        else:
            self.source = PackedCheckpoint(checkpoint)
            self.bits_per_value = self.source.manifest["bits_per_value"]
        self.adapter = None if adapter is None else open_adapter(adapter, self.source)

    @property
    def name(self) -> str:
        """That of the model's directory; of one that a run calls `checkpoint`, that of the run."""
        directory = getattr(self.source, "directory", None)
        if directory is not None and Path(directory).name == "checkpoint":
            return Path(directory).absolute().parent.name or self.source.name
        return self.source.name

    def params(self, dtype: str = "float32") -> Params:
        """The parameter tree on the device.

        Args:
          dtype: of dense weights; what a checkpoint holds beside its packed ones keeps its own.

        Raises:
          ValueError, NotImplementedError: see `packed_params`.
        """
        if self._packed:
            chosen = self._implementation
            if not self._exact:
                chosen = int8_effect.choose(self.source, chosen)
            params = on_huge_pages(packed_params(self.source, chosen))
        else:
            params = on_huge_pages(dense_params(self.source, dtype))
        if self.adapter is None:
            return params
        return beside(self.adapter, params, self.source.config.num_hidden_layers)
