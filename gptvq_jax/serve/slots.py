"""The caches of the engine: one batch of slots, and a sequence of its own beside them.

They have few lengths, so that a step costs what its longest text needs. What the caches of a slot
hold stays when its request has gone: a prompt that begins like it is read from there on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve import slot_programs as programs
from gptvq_jax.serve.requests import Counts, Job

_SHORTEST = 256  # positions of the caches, where there may be more
_WORTH = 16  # tokens from which on caches are copied rather than read again


def cache_lengths(context: int, chunk: int) -> tuple[int, ...]:
    """Lengths of the caches, rising by 4 up to `context` and a chunk that begins within it."""
    lengths, shorter = [context + chunk], context // 4
    while shorter >= max(_SHORTEST, 2 * chunk):
        lengths.append(shorter)
        shorter //= 4
    return tuple(reversed(lengths))


def cache_bytes(config: ModelConfig, count: int, length: int, dtype: str) -> int:
    """Of the caches of so many slots, and of the sequence that is alone, at a length."""
    sequences = count + 1 if count > 1 else 1
    values = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return sequences * length * values * jnp.dtype(dtype).itemsize


@dataclasses.dataclass
class Slot:
    """One sequence."""

    tokens: list[int] = dataclasses.field(default_factory=list)  # that the caches hold
    job: Job | None = None  # that goes on behind them
    used: int = 0  # a count that rises with every use

    def shared(self, prompt: Sequence[int]) -> int:
        """Tokens with which both begin."""
        count = 0
        for ours, theirs in zip(self.tokens, prompt, strict=False):
            if ours != theirs:
                break
            count += 1
        return count


class Slots:
    """Who is where, and the arrays.

    Args:
      config: of the model.
      count: sequences that are worked on at once.
      lengths: that the caches may have, rising.
      dtype: of the caches.
      counts: where copies are counted.

    Attributes:
      alone: the sequence in caches of its own, in which prompts are read; a request that is the
        only one stays there.
      others: the batch, as many slots as `count`; none where that is 1.
      length: of all caches now.
      alone_caches, caches: the arrays; None without `others`.
    """

    def __init__(
        self, config: ModelConfig, count: int, lengths: Sequence[int], dtype: str, counts: Counts
    ):
        self._config, self._dtype, self._lengths = config, dtype, lengths
        self._counts, self._clock = counts, 0
        self.length = lengths[0]
        self.alone = Slot()
        self.others = [Slot() for _ in range(count if count > 1 else 0)]
        self.alone_caches = self._empty(1)
        self.caches = self._empty(count) if self.others else None

    def _empty(self, batch: int) -> Any:
        # Made short, and lengthened: no other programs than those that are there already.
        short = programs.new_caches(self._config, batch, self._lengths[0], self._dtype)
        return short if self.length == self._lengths[0] else programs.resized(short, self.length)

    @property
    def all(self) -> list[Slot]:
        return [self.alone, *self.others]

    @property
    def jobs(self) -> list[Job]:
        return [slot.job for slot in self.all if slot.job is not None]

    def join(self) -> Slot:
        """Moves the request that was alone to the others; returns where it is now.

        One of them must be free; the one that was longest is taken.
        """
        place = self._oldest()
        self._insert(place)
        place.job = self.alone.job
        self._free(self.alone)
        return place

    def part(self, place: Slot) -> None:
        """Moves the request of a slot to where it is alone, which must be free."""
        self._keep(place)
        self._extract(place)
        self.alone.job = place.job
        self._free(place)

    def begin(self, job: Job) -> None:
        """Makes the free `alone` that of a request, with what some slot holds of its prompt."""
        shared = 0
        if not job.request.score_prompt:
            prompt = job.request.prompt[:-1]  # the last token is read in any case
            shared, best = self.alone.shared(prompt), self.alone
            for slot in self.others:
                if slot.shared(prompt) > max(shared, _WORTH - 1):
                    shared, best = slot.shared(prompt), slot
            if best is not self.alone:
                self._keep(best)
                self._extract(best)
        if shared < _WORTH:
            self._keep(None)
        del self.alone.tokens[shared:]
        job.reused = shared
        self._counts.reused += shared
        self.alone.job = job

    def leave(self, slot: Slot) -> None:
        """Frees a slot, which keeps what its caches hold."""
        self._free(slot)
        self._touch(slot)

    def forget(self, slot: Slot) -> None:
        """Empties the caches of a slot: what is no number must not be there, seen or not."""
        slot.tokens.clear()
        if slot is self.alone:
            self.alone_caches = self._empty(1)
        else:
            self.caches = programs.insert(self.caches, self.others.index(slot), self._empty(1))

    def fit(self, reading: int = 0, shrink: bool = False) -> None:
        """Gives the caches room for what comes next.

        Args:
          reading: positions that the sequence which is alone takes for the rest of its prompt.
          shrink: take shorter ones, too; free slots forget what is behind their end.
        """
        needed = [len(slot.tokens) + 1 for slot in self.all if slot.job is not None]
        needed += [len(self.alone.tokens) + reading] if reading else []
        if needed and (shrink or max(needed) > self.length):
            self.resize(next(n for n in self._lengths if n >= max(needed)))

    def resize(self, length: int) -> None:
        """Gives the caches one of their lengths."""
        if length == self.length:
            return
        self.alone_caches = programs.resized(self.alone_caches, length)
        if self.caches is not None:
            self.caches = programs.resized(self.caches, length)
        for slot in self.all:
            if slot.job is None:
                del slot.tokens[length - 1 :]
        self.length = length
        self._counts.copies += 1

    def _free(self, slot: Slot) -> None:
        slot.job = None
        # A slot that is free writes behind its tokens in every step of the others.
        del slot.tokens[self.length - 1 :]

    def _oldest(self, but: Slot | None = None) -> Slot | None:
        free = [slot for slot in self.others if slot.job is None and slot is not but]
        return min(free, key=lambda slot: slot.used, default=None)

    def _keep(self, but: Slot | None) -> None:
        """Copies what a text has left where it was alone to another free slot than `but`."""
        tokens, place = self.alone.tokens, self._oldest(but)
        if place is None or len(tokens) < _WORTH:
            return
        if max(slot.shared(tokens) for slot in self.others) < len(tokens):
            self._insert(place)

    def _insert(self, place: Slot) -> None:
        index = self.others.index(place)
        self.caches = programs.insert(self.caches, index, self.alone_caches)
        place.tokens = list(self.alone.tokens)
        self._touch(place)
        self._counts.copies += 1

    def _extract(self, place: Slot) -> None:
        index = self.others.index(place)
        self.alone_caches = programs.extract(self.caches, index, self._config)
        self.alone.tokens = list(place.tokens)
        self._touch(place)
        self._counts.copies += 1

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock
