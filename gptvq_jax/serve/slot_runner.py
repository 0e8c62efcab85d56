"""Runs the model on slots: from whom they belong to, to arrays, and back to numbers of the host."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve import slot_programs as programs
from gptvq_jax.serve.requests import Counts, TokenScore
from gptvq_jax.serve.slot_programs import Drawn, Draws, Scores
from gptvq_jax.serve.slots import Slot, Slots, cache_bytes, cache_lengths

_SHORT = 16  # tokens of a prompt, or of its end, that are read by a program of their own


@dataclasses.dataclass(frozen=True)
class Next:
    """What was drawn for one slot."""

    token: int
    key: np.ndarray  # uint32 (2,): of the draws to come
    finite: bool  # whether the model's scores were numbers
    score: TokenScore | None  # where it was asked for


class SlotRunner:
    """The programs of an engine, with the caches that they work on.

    Args:
      config: of the model.
      params: its tree.
      count: slots.
      context: most positions of a text.
      chunk: tokens of a prompt that are read at once, at most.
      dtype: of the activations and of the caches.

    Attributes:
      params, chunk: as above.
      slots: who is where.
      counts: what was done so far.
    """

    def __init__(
        self, config: ModelConfig, params: Any, count: int, context: int, chunk: int, dtype: str
    ):
        self.params, self.chunk = params, chunk
        self._config, self._count, self._dtype = config, count, dtype
        self._lengths = cache_lengths(context, chunk)
        self._sizes = sorted({min(_SHORT, chunk), chunk})  # of chunks, rising
        self.counts = Counts()
        self.reset()

    def reset(self) -> None:
        """Empties all slots and caches."""
        self.slots = Slots(self._config, self._count, self._lengths, self._dtype, self.counts)

    def read(self, prompt: Sequence[int]) -> jax.Array:
        """Reads the next chunk of the prompt of the slot that is alone, whose tokens it adds.

        Returns:
          Outputs (chunk, hidden) of the last block; what is behind the prompt means nothing.
        """
        start = len(self.slots.alone.tokens)
        chunk = prompt[start : start + self.chunk]
        x = self._read(chunk, start)
        self.slots.alone.tokens += chunk
        self.counts.chunks += 1
        self.counts.read += len(chunk)
        return x

    def _read(self, chunk: Sequence[int], start: int) -> jax.Array:
        slots = self.slots
        size = next(n for n in self._sizes if n >= len(chunk))
        tokens = self._padded(chunk)[None, :size]
        x, slots.alone_caches = programs.read_chunk(
            self._config, self.params, slots.alone_caches, tokens, np.int32(start), self.chunk
        )
        self.counts.rows_read += size
        return x

    def score(self, x: jax.Array, targets: Sequence[int]) -> list[TokenScore]:
        """Of tokens, each from the row of outputs (chunk, hidden) of the one before."""
        padded = self._padded(targets)
        scores = programs.score_chunk(self._config, self.params, x, padded)
        return _token_scores(scores)[: len(targets)]

    def draw_first(self, x: jax.Array, index: int) -> Next:
        """The token behind the prompt of the slot that is alone.

        Args:
          x: outputs (chunk, hidden).
          index: of the prompt's last token in them.
        """
        batch = [self.slots.alone]
        drawn = programs.draw_first(self._config, self.params, x, np.int32(index), _draws_of(batch))
        return _on_host(batch, drawn)[0]

    def step(self, batch: list[Slot]) -> list[Next]:
        """Feeds the newest token of every slot to the model, and draws the next.

        Args:
          batch: the slot that is alone, or all others.

        Returns:
          One for each slot; those of slots without a request mean nothing.
        """
        slots = self.slots
        alone = batch[0] is slots.alone
        tokens = np.array([slot.job.newest if slot.job else 0 for slot in batch], np.int32)
        positions = np.array([len(slot.tokens) for slot in batch], np.int32)
        caches = slots.alone_caches if alone else slots.caches
        drawn, caches = programs.step(
            self._config, self.params, caches, tokens, positions, _draws_of(batch)
        )
        if alone:
            slots.alone_caches = caches
        else:
            slots.caches = caches
        self.counts.steps += 1
        self.counts.slot_steps += len(batch)
        for slot in batch:
            if slot.job is not None:
                slot.tokens.append(slot.job.newest)
                self.counts.decoded += 1
        return _on_host(batch, drawn)

    def warm_up(self, on_program: Callable[[], None], shortest: bool) -> None:
        """See `Engine.warm_up`; empties all slots."""
        slots = self.slots
        for length in self._lengths[: 1 if shortest else None]:
            slots.resize(length)
            for size in self._sizes:
                x = self._read([0] * size, 0)
                on_program()
            self.step([slots.alone])
            on_program()
            if slots.others:
                self.step(slots.others)
                slots.caches = programs.insert(slots.caches, 0, slots.alone_caches)
                slots.alone_caches = programs.extract(slots.caches, 0, self._config)
                on_program()
            for other in () if shortest else self._lengths:
                slots.resize(other)
                slots.resize(length)
        self.draw_first(x, 0)
        on_program()
        if not shortest:
            self.score(x, [0])
            on_program()
        self.counts = Counts()
        self.reset()

    def num_programs(self, shortest: bool) -> int:
        """Of some size, which `warm_up` compiles."""
        of_length = len(self._sizes) + (1 if self._count == 1 else 2)
        return of_length + 1 if shortest else of_length * len(self._lengths) + 2

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Of the shortest and of the longest caches."""
        ends = self._lengths[0], self._lengths[-1]
        return tuple(cache_bytes(self._config, self._count, n, self._dtype) for n in ends)

    def _padded(self, tokens: Sequence[int]) -> np.ndarray:
        """(chunk,) int32."""
        array = np.zeros(self.chunk, np.int32)
        array[: len(tokens)] = tokens
        return array


def _draws_of(batch: list[Slot]) -> Draws:
    draws = Draws.greedy(len(batch))
    for index, slot in enumerate(batch):
        if slot.job is not None:
            sampling = slot.job.request.sampling
            draws.keys[index] = slot.job.key
            draws.temperature[index] = sampling.temperature
            draws.top_k[index], draws.top_p[index] = sampling.top_k, sampling.top_p
            draws.scored[index] = slot.job.request.scored
    return draws


def _on_host(batch: list[Slot], drawn: Drawn) -> list[Next]:
    drawn = jax.device_get(drawn)
    scored = [slot.job is not None and slot.job.request.scored for slot in batch]
    scores = _token_scores(drawn.scores) if any(scored) else [None] * len(batch)
    return [
        Next(int(token), key, bool(finite), score if wanted else None)
        for token, key, finite, score, wanted in zip(
            drawn.tokens, drawn.keys, drawn.finite, scores, scored, strict=True
        )
    ]


def _token_scores(scores: Scores) -> list[TokenScore]:
    scores = jax.device_get(scores)
    rows = zip(scores.of_token, scores.tokens, scores.logprobs, strict=True)
    return [
        TokenScore(
            float(of_token),
            [(int(t), float(p)) for t, p in zip(tokens, logprobs, strict=True) if t >= 0],
        )
        for of_token, tokens, logprobs in rows
    ]
