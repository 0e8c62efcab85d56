"""What an engine may be asked to be, checked before a model is loaded."""

from gptvq_jax.models.config import ModelConfig

CHUNK = 64  # tokens of a prompt that are read between two steps


def check_options(
    config: ModelConfig,
    *,
    slots: int = 1,
    context: int | None = None,
    queue: int = 0,
    chunk: int = CHUNK,
) -> None:
    """Raises ValueError for options of an `Engine` that are out of range."""
    limit = config.max_position_embeddings
    if context is not None and not 2 <= context <= limit:
        raise ValueError(f"{context=} must be from 2 to {limit}, the model's positions")
    for name, value, least in (("slots", slots, 1), ("queue", queue, 0), ("chunk", chunk, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
