"""Continuous batching: a fixed number of slots, which requests enter and leave between steps.

A prompt is read in chunks, one between two steps of the others, in caches of its own; then its
request moves into a free slot. A request that is alone is decoded where its prompt was read, by a
program of one row: it waits for no empty slots. Every program has been compiled after `warm_up`,
and none is after that.

A text does not depend on what else is in the batch, but by rounding: a product of one row may be
added up in another order than that of many.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gptvq_jax.console.errors import first_line
from gptvq_jax.core.seeds import random_key
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve import slot_programs as programs
from gptvq_jax.serve.requests import Counts, Job, Listener, Request, TokenScore
from gptvq_jax.serve.slot_programs import Drawn, Draws, Scores
from gptvq_jax.serve.slots import Slot, Slots, cache_lengths

CHUNK = 64  # tokens of a prompt that are read between two steps
_NO_NUMBERS = "error: the model's scores are not finite; --dtype=float32 has the widest range"


class EngineFull(Exception):
    """As many requests as may wait are waiting."""


class Engine:
    """Continues prompts, many at once. One thread calls `step`; what it offers others is said.

    Args:
      config: of the model.
      params: its tree, dense or with packed leaves, such as from params.py.
      slots: requests that are worked on at once.
      context: most positions of a text, its prompt included; None: those of the model.
      queue: requests that may wait beside them.
      stop_tokens: each ends its text, and is not part of it.
      dtype: of the activations and of the caches: float32, bfloat16 or float16.
      chunk: tokens of a prompt that are read between two steps of the others.

    Attributes:
      params, context: as above.
      num_slots: requests that are worked on at once.
      most_jobs: requests that may be worked on or wait.
      counts: what was done so far.

    Raises:
      ValueError: a number is out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        slots: int,
        context: int | None = None,
        queue: int = 64,
        stop_tokens: Sequence[int] = (),
        dtype: str = "float32",
        chunk: int = CHUNK,
    ):
        check_options(config, slots=slots, context=context, queue=queue, chunk=chunk)
        self.context = config.max_position_embeddings if context is None else context
        self.params, self._config, self._dtype = params, config, dtype
        self._stop_tokens, self._chunk, self.num_slots = frozenset(stop_tokens), chunk, slots
        self._lengths = cache_lengths(self.context, chunk)
        self.most_jobs, self.counts = slots + queue, Counts()
        self._lock = threading.Lock()  # of what follows
        self._waiting: deque[Job] = deque()
        self._num_jobs, self._closed = 0, False
        self._reset()

    def _reset(self) -> None:
        self._slots = Slots(self._config, self.num_slots, self._lengths, self._dtype, self.counts)
        self._reading: Job | None = None  # that of `alone`, as long as its prompt is read
        self._prompt_scores: list[TokenScore] = []

    # --- for any thread ---

    def submit(self, *pairs: tuple[Request, Listener]) -> list[Job]:
        """Queues all of some requests, or none; their listeners hear of them from `step`.

        Raises:
          ValueError: the model cannot do one of them.
          EngineFull: too many requests wait, or the engine is closed.
        """
        jobs = []
        for request, listener in pairs:
            request.check(self._config, self.context)
            key = np.asarray(jax.random.key_data(random_key(request.seed)))
            jobs.append(Job(request, listener, key))
        with self._lock:
            if self._closed:
                raise EngineFull("the engine is closed")
            if self._num_jobs + len(jobs) > self.most_jobs:
                raise EngineFull(f"{self._num_jobs} requests are worked on or wait already")
            self._num_jobs += len(jobs)
            self._waiting.extend(jobs)
        return jobs

    @property
    def num_jobs(self) -> int:
        """Requests that are worked on or wait; from any thread."""
        return self._num_jobs

    @property
    def closed(self) -> bool:
        """Whether it takes no further requests; from any thread."""
        return self._closed

    def close(self) -> None:
        """Takes no further requests; the next `step` ends those that there are. Any thread."""
        with self._lock:
            self._closed = True

    # --- for one thread ---

    def step(self) -> None:
        """Lets a newcomer in, reads a chunk of its prompt, makes a token of every other request.

        Raises:
          Exception: a program failed; all requests have been ended, and further ones are taken.
        """
        if self._closed:
            self._end_all("closed")
            return
        try:
            self._drop_cancelled()
            if self._reading is None:
                self._admit()
            if self._reading is not None:
                self._read()
            self._decode()
        except Exception as error:
            self._end_all(f"error: {first_line(error)} ({type(error).__name__})")
            self._reset()  # the program may have had the caches
            raise

    def warm_up(
        self, on_program: Callable[[], None] = lambda: None, shortest: bool = False
    ) -> None:
        """Compiles every program by running it, before the first request.

        Args:
          on_program: called after each of `num_programs`.
          shortest: only those that the shortest caches need; others are compiled when they grow.
        """
        slots = self._slots
        for length in self._lengths[: 1 if shortest else None]:
            slots.resize(length)
            x = self._read_chunk(np.zeros((1, self._chunk), np.int32), 0)
            on_program()
            self._step([slots.alone])
            on_program()
            if slots.others:
                self._step(slots.others)
                slots.caches = programs.insert(slots.caches, 0, slots.alone_caches)
                slots.alone_caches = programs.extract(slots.caches, 0, self._config)
                on_program()
            for other in () if shortest else self._lengths:
                slots.resize(other)
                slots.resize(length)
        programs.draw_first(self._config, self.params, x, np.int32(0), Draws.greedy(1))
        on_program()
        if not shortest:
            targets = np.zeros(self._chunk, np.int32)
            jax.block_until_ready(programs.score_chunk(self._config, self.params, x, targets))
            on_program()
        self.counts = Counts()
        self._reset()

    def num_programs(self, shortest: bool = False) -> int:
        """Of some size, which `warm_up` compiles."""
        of_length = 2 if self.num_slots == 1 else 3
        return of_length + 1 if shortest else of_length * len(self._lengths) + 2

    # --- who enters and who leaves ---

    def _drop_cancelled(self) -> None:
        with self._lock:
            dropped = [job for job in self._waiting if job.cancelled]
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for job in dropped:
            self._tell_end(job, "cancelled")
        for slot in self._slots.all:
            if slot.job is not None and slot.job.cancelled:
                self._leave(slot, "cancelled")

    def _admit(self) -> None:
        if len(self._slots.jobs) >= self.num_slots:
            return
        with self._lock:
            job = self._waiting.popleft() if self._waiting else None
        if job is not None:
            if self._slots.alone.job is not None:
                self._slots.join()
            self._slots.begin(job)
            self._reading, self._prompt_scores = job, []
            self._slots.fit(self._to_read(), shrink=True)

    def _to_read(self) -> int:
        """Positions that the prompt which is read still takes, the last chunk's padding too."""
        if self._reading is None:
            return 0
        return len(self._reading.request.prompt) - len(self._slots.alone.tokens) + self._chunk

    def _leave(self, slot: Slot, reason: str) -> None:
        job = slot.job
        if job is self._reading:
            self._reading = None
        self._slots.leave(slot)
        self._slots.fit(self._to_read(), shrink=True)
        self._tell_end(job, reason)

    def _tell_end(self, job: Job, reason: str) -> None:
        with self._lock:
            self._num_jobs -= 1
        job.listener.on_end(reason)

    def _end_all(self, reason: str) -> None:
        self._reading = None
        jobs = self._slots.jobs
        for slot in self._slots.all:
            slot.job = None
        with self._lock:
            jobs += self._waiting
            self._waiting.clear()
        for job in jobs:
            self._tell_end(job, reason)

    # --- what a step does ---

    def _read(self) -> None:
        """Reads the next chunk of a prompt; behind its last, draws the first token."""
        job, slot = self._reading, self._slots.alone
        prompt, start = job.request.prompt, len(slot.tokens)
        self._slots.fit(self._to_read())
        chunk = prompt[start : start + self._chunk]
        x = self._read_chunk(_padded(chunk, self._chunk)[None], start)
        slot.tokens += chunk
        self.counts.read += len(chunk)
        if job.request.score_prompt:
            targets = prompt[start + 1 : start + 1 + len(chunk)]
            padded = _padded(targets, self._chunk)
            scores = programs.score_chunk(self._config, self.params, x, padded)
            self._prompt_scores += token_scores(scores)[: len(targets)]
        if len(slot.tokens) < len(prompt):
            return
        self._reading = None
        if job.request.score_prompt:
            job.listener.on_prompt(self._prompt_scores)
        if job.request.max_tokens == 0:
            self._leave(slot, "length")
            return
        index, draws = np.int32(len(chunk) - 1), _draws([slot])
        self._hand_out([slot], programs.draw_first(self._config, self.params, x, index, draws))
        if slot.job is not None and any(other.job is not None for other in self._slots.others):
            self._slots.join()

    def _read_chunk(self, tokens: np.ndarray, start: int) -> jax.Array:
        slots = self._slots
        x, slots.alone_caches = programs.read_chunk(
            self._config, self.params, slots.alone_caches, tokens, np.int32(start)
        )
        self.counts.chunks += 1
        return x

    def _decode(self) -> None:
        """Makes a token of every request whose prompt has been read."""
        slots = self._slots
        active = [slot for slot in slots.others if slot.job is not None]
        if len(active) == 1 and slots.alone.job is None and not self._waiting:
            slots.part(active[0])
            active = []
        if active:
            slots.fit(self._to_read())
            self._step(slots.others)
        elif slots.alone.job is not None and self._reading is None:
            slots.fit()
            self._step([slots.alone])

    def _step(self, batch: list[Slot]) -> None:
        """Feeds the newest token of every slot of a batch to the model, and hands out the next."""
        slots = self._slots
        alone = batch[0] is slots.alone
        tokens = np.array([slot.job.newest if slot.job else 0 for slot in batch], np.int32)
        positions = np.array([len(slot.tokens) for slot in batch], np.int32)
        drawn, caches = programs.step(
            self._config,
            self.params,
            slots.alone_caches if alone else slots.caches,
            tokens,
            positions,
            _draws(batch),
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
        self._hand_out(batch, drawn)

    def _hand_out(self, batch: list[Slot], drawn: Drawn) -> None:
        drawn = jax.device_get(drawn)
        scored = any(slot.job is not None and slot.job.request.scored for slot in batch)
        scores = token_scores(drawn.scores) if scored else [None] * len(batch)
        for index, slot in enumerate(batch):
            if slot.job is not None:
                slot.job.key = drawn.keys[index]
                if not drawn.finite[index]:
                    self._leave(slot, _NO_NUMBERS)
                    self._slots.forget(slot)
                    continue
                ended = self._hand_to(slot.job, int(drawn.tokens[index]), scores[index])
                if ended is not None:
                    self._leave(slot, ended)

    def _hand_to(self, job: Job, token: int, score: TokenScore | None) -> str | None:
        """Gives a request its next token; returns why it ends, if it does."""
        if token in self._stop_tokens:
            return "stop"
        job.newest = token
        job.made += 1
        try:
            enough = job.listener.on_token(token, score if job.request.scored else None)
        except Exception as error:  # the others have nothing to do with it
            return f"error: {first_line(error)} ({type(error).__name__})"
        if enough:
            return "stop"
        return "length" if job.made == job.request.max_tokens else None


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


def token_scores(scores: Scores) -> list[TokenScore]:
    """Of every row, on the host."""
    scores = jax.device_get(scores)
    return [
        TokenScore(
            float(of_token),
            [(int(t), float(p)) for t, p in zip(tokens, logprobs, strict=True) if t >= 0],
        )
        for of_token, tokens, logprobs in zip(
            scores.of_token, scores.tokens, scores.logprobs, strict=True
        )
    ]


def _padded(tokens: Sequence[int], length: int) -> np.ndarray:
    """(length,) int32."""
    array = np.zeros(length, np.int32)
    array[: len(tokens)] = tokens
    return array


def _draws(batch: list[Slot]) -> Draws:
    draws = Draws.greedy(len(batch))
    for index, slot in enumerate(batch):
        if slot.job is not None:
            sampling = slot.job.request.sampling
            draws.keys[index] = slot.job.key
            draws.temperature[index] = sampling.temperature
            draws.top_k[index], draws.top_p[index] = sampling.top_k, sampling.top_p
            draws.scored[index] = slot.job.request.scored
    return draws
