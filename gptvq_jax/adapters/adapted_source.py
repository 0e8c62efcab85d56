"""A model with an adapter merged into its weights, block by block as they are read."""

import hashlib
from typing import Any

from gptvq_jax.adapters.adapter import Adapter, merged
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.source import ModelSource


class AdaptedSource:
    """A ModelSource over another one, dense or packed.

    Args:
      base: the model.
      adapter: of its layers.
    """

    def __init__(self, base: ModelSource, adapter: Adapter):
        self.base, self.adapter = base, adapter
        of_both = f"{base.fingerprint} {adapter.fingerprint}"
        self.fingerprint = hashlib.sha256(of_both.encode()).hexdigest()

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return self.base.stop_tokens

    def companions(self) -> dict[str, bytes]:
        """See ModelSource.companions."""
        return self.base.companions()

    def outer(self) -> dict[str, Any]:
        """See ModelSource.outer."""
        return self.base.outer()

    def block(self, index: int) -> dict[str, Any]:
        """See ModelSource.block."""
        return merged(self.base.block(index), self.adapter.of_block(index))
