"""How likely a model finds given continuations of given contexts.

Texts are sorted by length, and go through the blocks in batches of one size, padded on the right to
few lengths (lengths.py). Behind the last block only the outputs that predict a token of a
continuation are multiplied by the head, a chunk of them at a time: no other logits are ever made.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import head_chunk
from gptvq_jax.models.llama import block_forward, embed, head_logits
from gptvq_jax.serve.lengths import padded_length
from gptvq_jax.serve.params import outer_params

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context and of its continuation


@dataclasses.dataclass(frozen=True)
class Score:
    """Of a continuation."""

    logprob: float  # natural logarithm of its probability after the context
    greedy: bool  # whether each of its tokens is the likeliest after those before


@dataclasses.dataclass(frozen=True)
class Batch:
    """Texts that go through the model together, and which of their next tokens are scored.

    Element i of the last four stands for one of n predictions.
    """

    tokens: np.ndarray  # (batch, time) int32, padded on the right
    rows: np.ndarray  # (n,) int32: which text
    positions: np.ndarray  # (n,) int32: of the token before, in its text
    targets: np.ndarray  # (n,) int32: the token that is scored
    owners: np.ndarray  # (n,) int: which of all pairs it belongs to

    def flops(self, config: ModelConfig) -> int:
        """Of `score_batch`."""
        size = head_chunk(config, 1)
        heads = -(-len(self.rows) // size)
        blocks = flops.blocks_forward(config, *self.tokens.shape)
        return blocks + flops.logits(config, heads, size)


def plan_batches(pairs: Sequence[Pair], batch_size: int, max_length: int) -> list[Batch]:
    """Sorts pairs by length, the longest first, into batches.

    Pairs that differ in the last token alone, such as the letters of a multiple choice, are one
    text with several targets. What is longer than the model sees is cut on the left.

    Args:
      pairs: of tokens, neither part empty.
      batch_size: texts in a batch; the last one is filled up with padding.
      max_length: most tokens that the model reads at once.

    Raises:
      ValueError: a part is empty, or a continuation longer than `max_length`.
    """
    texts: dict[tuple[int, ...], list[tuple[int, Sequence[int]]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            which = "continuation" if context else "context"
            raise ValueError(f"the {which} of request {index} has no tokens; mend the task")
        if len(continuation) > max_length:
            raise ValueError(
                f"the continuation of request {index} has {len(continuation)} tokens, more than "
                f"the model reads at once, which is {max_length}; leave its task out"
            )
        seen = (*context, *continuation)[-max_length - 1 : -1]
        texts.setdefault(seen, []).append((index, continuation))
    ordered = sorted(texts, key=lambda tokens: (-len(tokens), tokens))
    return [
        _batch(ordered[start : start + batch_size], texts, batch_size, max_length)
        for start in range(0, len(ordered), batch_size)
    ]


def score_batch(
    config: ModelConfig, params: Any, batch: Batch, dtype: str = "float32"
) -> dict[int, Score]:
    """{index of a pair: its score} of all pairs of a batch.

    Args:
      config: of the model.
      params: its tree, dense or with packed leaves, such as from params.py.
      batch: from `plan_batches`.
      dtype: of the activations; the logits are float32.
    """
    x = last_hidden(config, params, batch.tokens, dtype)
    return score_outputs(config, outer_params(params), batch, x)


def score_outputs(config: ModelConfig, outer: Any, batch: Batch, x: jax.Array) -> dict[int, Score]:
    """`score_batch` behind the last block.

    Args:
      config: of the model.
      outer: its tree without the blocks.
      batch: from `plan_batches`.
      x: (batch, time, hidden), the outputs of the last block.
    """
    logprobs, greedy = [], []
    size = head_chunk(config, 1)
    for start in range(0, len(batch.rows), size):
        part = slice(start, start + size)
        chunk = [np.resize(a[part], size) for a in (batch.rows, batch.positions)]
        targets = np.resize(batch.targets[part], size)
        of_chunk = _score(config, outer, x, *chunk, targets)
        count = len(batch.rows[part])
        logprobs.append(np.asarray(of_chunk[0], np.float64)[:count])
        greedy.append(np.asarray(of_chunk[1])[:count])
    pairs, first = np.unique(batch.owners, return_index=True)
    sums = np.add.reduceat(np.concatenate(logprobs), first)
    every = np.logical_and.reduceat(np.concatenate(greedy), first)
    return {
        int(pair): Score(float(total), bool(all_greedy))
        for pair, total, all_greedy in zip(pairs, sums, every, strict=True)
    }


def last_hidden(
    config: ModelConfig, params: Any, tokens: np.ndarray, dtype: str = "float32"
) -> jax.Array:
    """Outputs of the last block.

    Args:
      config: of the model.
      params: its tree, dense or with packed leaves.
      tokens: (batch, time) int32.
      dtype: of the activations.

    Returns:
      (batch, time, hidden) in `dtype`, before the final norm.
    """
    x = embed(config, outer_params(params), tokens).astype(dtype)
    for index in range(config.num_hidden_layers):
        x = block_forward(config.of_block(index), params[f"layers_{index}"], x)
    return x


@partial(jax.jit, static_argnames="config")
def _score(config, outer, x, rows, positions, targets):
    """Log-probabilities (n,) of targets, and whether each is the likeliest."""
    logits = head_logits(config, outer, x[rows, positions][None])[0]
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


def _batch(texts, pairs_of, batch_size: int, max_length: int) -> Batch:
    time = min(padded_length(len(texts[0])), max_length)
    tokens = np.zeros((batch_size, time), np.int32)
    scored = []
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        for index, continuation in pairs_of[text]:
            first = len(text) - len(continuation)
            scored += [(row, first + i, token, index) for i, token in enumerate(continuation)]
    # By pair, so that those of one stand together in order.
    rows, positions, targets, owners = np.array(sorted(scored, key=lambda s: s[3]), np.int32).T
    return Batch(tokens, rows, positions, targets, owners)
