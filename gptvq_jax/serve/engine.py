"""Continuous batching: a fixed number of slots, which requests enter and leave between steps.

A prompt is read in chunks, one between two steps of the others, in caches of its own; then its
request moves into a free slot. A request that is alone is decoded where its prompt was read, by a
program of one row: it waits for no empty slots. Every program has been compiled after `warm_up`,
and none is after that.

A text does not depend on what else is in the batch, but by rounding: a product of one row may be
added up in another order than that of many.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gptvq_jax.console.errors import first_line
from gptvq_jax.core.seeds import random_key
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.engine_options import CHUNK, check_options
from gptvq_jax.serve.job_queue import JobQueue
from gptvq_jax.serve.requests import Counts, Job, Listener, Request, TokenScore
from gptvq_jax.serve.slot_runner import Next, SlotRunner
from gptvq_jax.serve.slots import Slot, Slots

_NO_NUMBERS = "error: the model's scores are not finite; --dtype=float32 has the widest range"


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
      context: as above.
      num_slots: requests that are worked on at once.
      most_jobs: requests that may be worked on or wait.

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
        self._config = config
        self._stop_tokens, self.num_slots = frozenset(stop_tokens), slots
        self.most_jobs = slots + queue
        self._runner = SlotRunner(config, params, slots, self.context, chunk, dtype)
        self._queue = JobQueue(self.most_jobs)
        self._reading: Job | None = None  # that of `alone`, as long as its prompt is read
        self._prompt_scores: list[TokenScore] = []

    @property
    def params(self) -> Any:
        """The model's tree."""
        return self._runner.params

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return self._runner.counts

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Of the caches, when all texts are short, and when one is as long as the context."""
        return self._runner.cache_bytes

    @property
    def _slots(self) -> Slots:
        return self._runner.slots

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
            jobs.append(Job(request, listener, _key_data(request.seed)))
        self._queue.add(jobs)
        return jobs

    @property
    def num_jobs(self) -> int:
        """Requests that are worked on or wait; from any thread."""
        return self._queue.count

    @property
    def busy_slots(self) -> int:
        """Slots that a request has; from any thread."""
        return len(self._slots.jobs)

    @property
    def closed(self) -> bool:
        """Whether it takes no further requests; from any thread."""
        return self._queue.closed

    def close(self) -> None:
        """Takes no further requests; the next `step` ends those that there are. Any thread."""
        self._queue.close()

    # --- for one thread ---

    def step(self) -> None:
        """Lets a newcomer in, reads a chunk of its prompt, makes a token of every other request.

        Raises:
          Exception: a program failed; all requests have been ended, and further ones are taken.
        """
        if self._queue.closed:
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
            self._runner.reset()  # the program may have had the caches
            raise

    def warm_up(
        self, on_program: Callable[[], None] = lambda: None, shortest: bool = False
    ) -> None:
        """Compiles every program by running it, before the first request.

        Args:
          on_program: called after each of `num_programs`.
          shortest: only those that the shortest caches need; others are compiled when they grow.
        """
        _key_data(0)
        self._runner.warm_up(on_program, shortest)

    def num_programs(self, shortest: bool = False) -> int:
        """Of some size, which `warm_up` compiles."""
        return self._runner.num_programs(shortest)

    # --- who enters and who leaves ---

    def _drop_cancelled(self) -> None:
        for job in self._queue.take_cancelled():
            self._tell_end(job, "cancelled")
        for slot in self._slots.all:
            if slot.job is not None and slot.job.cancelled:
                self._leave(slot, "cancelled")

    def _admit(self) -> None:
        if len(self._slots.jobs) >= self.num_slots:
            return
        job = self._queue.take()
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
        return (
            len(self._reading.request.prompt) - len(self._slots.alone.tokens) + self._runner.chunk
        )

    def _leave(self, slot: Slot, reason: str) -> None:
        job = slot.job
        if job is self._reading:
            self._reading = None
        self._slots.leave(slot)
        self._slots.fit(self._to_read(), shrink=True)
        self._tell_end(job, reason)

    def _tell_end(self, job: Job, reason: str) -> None:
        self._queue.ended()
        job.listener.on_end(reason)

    def _end_all(self, reason: str) -> None:
        self._reading = None
        jobs = self._slots.jobs
        for slot in self._slots.all:
            slot.job = None
        for job in jobs + self._queue.take_all():
            self._tell_end(job, reason)

    # --- what a step does ---

    def _read(self) -> None:
        """Reads the next chunk of a prompt; behind its last, draws the first token."""
        job, slot = self._reading, self._slots.alone
        prompt, start = job.request.prompt, len(slot.tokens)
        self._slots.fit(self._to_read())
        x = self._runner.read(prompt)
        if job.request.score_prompt:
            targets = prompt[start + 1 : len(slot.tokens) + 1]
            self._prompt_scores += self._runner.score(x, targets)
        if len(slot.tokens) < len(prompt):
            return
        self._reading = None
        if job.request.score_prompt:
            job.listener.on_prompt(self._prompt_scores)
        if job.request.max_tokens == 0:
            self._leave(slot, "length")
            return
        self._hand_out([slot], [self._runner.draw_first(x, len(prompt) - 1 - start)])
        if slot.job is not None and any(other.job is not None for other in self._slots.others):
            self._slots.join()

    def _decode(self) -> None:
        """Makes a token of every request whose prompt has been read."""
        slots = self._slots
        active = [slot for slot in slots.others if slot.job is not None]
        if len(active) == 1 and slots.alone.job is None and not self._queue.waiting:
            slots.part(active[0])
            active = []
        if active:
            batch = slots.others
        elif slots.alone.job is not None and self._reading is None:
            batch = [slots.alone]
        else:
            return
        slots.fit(self._to_read())
        self._hand_out(batch, self._runner.step(batch))

    def _hand_out(self, batch: list[Slot], drawn: list[Next]) -> None:
        for slot, new in zip(batch, drawn, strict=True):
            if slot.job is None:
                continue
            slot.job.key = new.key
            if not new.finite:
                self._leave(slot, _NO_NUMBERS)
                self._slots.forget(slot)
                continue
            ended = self._hand_to(slot.job, new)
            if ended is not None:
                self._leave(slot, ended)

    def _hand_to(self, job: Job, new: Next) -> str | None:
        """Gives a request its next token; returns why it ends, if it does."""
        if new.token in self._stop_tokens:
            return "stop"
        job.newest = new.token
        job.made += 1
        try:
            enough = job.listener.on_token(new.token, new.score)
        except Exception as error:  # the others have nothing to do with it
            return f"error: {first_line(error)} ({type(error).__name__})"
        if enough:
            return "stop"
        return "length" if job.made == job.request.max_tokens else None


def _key_data(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(random_key(seed)))
