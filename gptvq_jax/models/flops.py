"""FLOP of matrix products in a decoder, as llama.py executes them. As in core/flops.py.

With P the weights of a block's linear layers and N tokens, attention apart: 2 P N forward, 2 P N
for the gradient with respect to what the layers read, 2 P N for that with respect to the weights.
Attention costs twice its forward products on the way back. tests/models/test_decoder_flops.py
counts the same in the traced programs.

A driver adds a call where it makes one, in the stage that its thread is in:

    y = block_forward(config, block, x)
    stopwatch.flops(flops.block_forward(config, *x.shape[:2]))
"""

from collections.abc import Iterable

from gptvq_jax.core.flops import product
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import head_chunk, loss_chunk
from gptvq_jax.models.shapes import opened_width
from gptvq_jax.models.stages import STAGES


def stage_weights(config: ModelConfig) -> tuple[int, ...]:
    """Of the linear layers of each of stages.STAGES that a token meets.

    Of experts those are the ones it goes to, and the router, which both stages ask. Rows that fill
    up the blocks of an expert (models/experts.py) are left out: how many there are depends on the
    tokens, at most half as many as there are tokens times experts of each.
    """
    hidden, inner = config.hidden_size, opened_width(config, 2)
    q, kv = (
        count * config.head_dim
        for count in (config.num_attention_heads, config.num_key_value_heads)
    )
    router = hidden * config.experts
    attention = hidden * (q + 2 * kv), q * hidden
    return *attention, 2 * hidden * inner + router, inner * hidden + router


def linear_weights(config: ModelConfig) -> int:
    """P, the weights of the linear layers of a block that a token meets."""
    return sum(stage_weights(config))


def visible_pairs(config: ModelConfig, time: int, chunk_size: int = 128) -> int:
    """Pairs of a query and a key that are multiplied, masked or not, in a sequence of one head.

    Args:
      config: of a block; a sliding window leaves keys out. Of a model whose blocks differ, as if
        none had a window.
      time: tokens of the sequence.
      chunk_size: queries that go together, against all keys that one of them sees.
    """
    reach = time if config.sliding_window is None else config.sliding_window
    pairs = 0
    for start in range(0, time, chunk_size):
        stop = min(start + chunk_size, time)
        pairs += (stop - start) * (stop - max(0, start - reach + 1))
    return pairs


def attention(config: ModelConfig, batch: int, time: int, chunk_size: int = 128) -> int:
    """q k^T and its product with v, in all heads."""
    pairs = batch * config.num_attention_heads * visible_pairs(config, time, chunk_size)
    return 2 * product(1, config.head_dim, 1) * pairs


def block_forward(config: ModelConfig, batch: int, time: int) -> int:
    """A block on (batch, time, hidden)."""
    return stage_flops(config, range(len(STAGES)), batch, time)


def blocks_forward(config: ModelConfig, batch: int, time: int) -> int:
    """All blocks of a model."""
    blocks = config.block_counts().items()
    return sum(count * block_forward(block, batch, time) for block, count in blocks)


def stage_flops(config: ModelConfig, stages: Iterable[int], batch: int, time: int) -> int:
    """Some stages of a block (stages.STAGES) on (batch, time, hidden)."""
    stages, weights = tuple(stages), stage_weights(config)
    layers = product(batch * time, sum(weights[stage] for stage in stages), 1)
    return layers + (0 in stages) * attention(config, batch, time)


def closing_outputs(config: ModelConfig, stages: Iterable[int], batch: int, time: int) -> int:
    """llama.closing_outputs of those of some stages that close a half of the block."""
    again = [stage for stage in stages if stage in (1, 3) and config.family.norms[stage]]
    return sum(stage_flops(config, (stage - 1, stage), batch, time) for stage in again)


def block_inputs(config: ModelConfig, batch: int, time: int) -> int:
    """The same where only what its layers read is wanted: down_proj is not executed."""
    return stage_flops(config, range(len(STAGES) - 1), batch, time)


def block_backward(config: ModelConfig, batch: int, time: int) -> int:
    """run.gradients.block_backward: `block_inputs` again, and gradients of activations.

    None of parameters: those with respect to the outputs of the layers come on the way.
    """
    layers = product(batch * time, linear_weights(config), 1)
    back = layers + 2 * attention(config, batch, time)
    return block_inputs(config, batch, time) + back


def block_tuning(config: ModelConfig, batch: int, time: int) -> int:
    """Loss of a block, and gradients with respect to all its weights and norms: a tuning step."""
    return 3 * block_forward(config, batch, time)


def model_tuning(config: ModelConfig, batch: int, time: int) -> int:
    """A batch of a step of run.tune_model: loss of the whole model, and gradients of all weights.

    Blocks go forward, forward again but for the last product, and backward; the head goes forward,
    in the float model too, and backward, but not to its own weights.
    """
    blocks = config.block_counts().items()
    again = sum(count * block_inputs(block, batch, time) for block, count in blocks)
    back = 3 * blocks_forward(config, batch, time)
    return back + again + divergence(config, batch, time)


def divergence(config: ModelConfig, batch: int, time: int) -> int:
    """run.model_loss.divergence of all tokens of windows, in whole chunks."""
    size = loss_chunk(config, batch)
    return 3 * logits(config, batch, -(-time // size) * size)


def logits(config: ModelConfig, batch: int, time: int) -> int:
    """llama.head_logits of (batch, time, hidden)."""
    return product(batch * time, config.hidden_size, config.vocab_size)


def head_forward(config: ModelConfig, batch: int, time: int, chunk_size: int | None = None) -> int:
    """Logits of all tokens but the last of each window, in whole chunks.

    Args:
      config: of the model.
      batch, time: of the windows.
      chunk_size: tokens of each window at once; None: as run.token_losses.token_nll.
    """
    size = head_chunk(config, batch) if chunk_size is None else chunk_size
    return logits(config, batch, -(-(time - 1) // size) * size)


def head_backward(config: ModelConfig, batch: int, time: int, chunk_size: int | None = None) -> int:
    """run.gradients.head_backward: `head_forward` again, and the gradient of activations."""
    return 2 * head_forward(config, batch, time, chunk_size)
