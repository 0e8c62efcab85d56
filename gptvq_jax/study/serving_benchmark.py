"""What a server of this machine does for one client and for several, and what hang-ups cost."""

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.serve.engine import Engine
from gptvq_jax.study.live_server import Answer, ask, resident_bytes, settled

_PROMPT = 16  # tokens of a prompt
_SHORT = 8  # tokens of an answer, at most, where answers are cut off


class Load:
    """Clients of one server.

    Args:
      port, name: of the server and of its model.
      config: of the model.
      seed: of prompts, and of who hangs up.
    """

    def __init__(self, port: int, name: str, config: ModelConfig, seed: int = 0):
        self._port, self._name, self._vocab = port, name, config.vocab_size
        self._random = random.Random(seed)

    def prompt(self) -> list[int]:
        """One that shares nothing with the others."""
        return [self._random.randrange(self._vocab) for _ in range(_PROMPT)]

    def together(self, clients: int, tokens: int) -> tuple[float, list[Answer]]:
        """Each asks once, all at the same time; returns tokens per second, and what each saw."""
        prompts = [self.prompt() for _ in range(clients)]
        with ThreadPoolExecutor(clients) as pool:
            start = time.perf_counter()
            answers = list(
                pool.map(lambda prompt: ask(self._port, self._name, prompt, tokens), prompts)
            )
            seconds = time.perf_counter() - start
        return sum(answer.tokens for answer in answers) / seconds, answers

    def short(
        self, requests: int, killed: float, clients: int, on_answer: Callable[[], None]
    ) -> int:
        """Many short requests, of which a share hangs up midway; returns how many did."""
        after = [
            self._random.randint(1, _SHORT - 1) if self._random.random() < killed else None
            for _ in range(requests)
        ]
        work = [(self.prompt(), pieces) for pieces in after]

        def one(each: tuple[list[int], int | None]) -> None:
            ask(self._port, self._name, each[0], _SHORT, each[1])
            on_answer()

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(one, work))
        return sum(pieces is not None for pieces in after)


def measure_clients(
    load: Load,
    clients: Sequence[int],
    tokens: int,
    repeats: int,
    on_round: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Every number of clients in turn, in every round.

    Args:
      load: of the server.
      clients: numbers of them.
      tokens: of an answer, at most.
      repeats: rounds, after one that does not count.
      on_round: called after each, and after that one.

    Returns:
      "clients", "tokens_per_second" (all together, prompts included; median), "quartiles",
      "first_token" (seconds, median and largest), and "to_first": the median of the ratios of a
      round to the first number of clients.
    """
    speeds, firsts = np.empty((len(clients), repeats)), [[] for _ in clients]
    for number in range(-1, repeats):
        for index, count in enumerate(clients):
            speed, answers = load.together(count, tokens)
            if number >= 0:
                speeds[index, number] = speed
                firsts[index] += [answer.first for answer in answers]
        on_round()
    rows = []
    for index, count in enumerate(clients):
        low, median, high = np.quantile(speeds[index], (0.25, 0.5, 0.75))
        rows.append(
            {
                "clients": count,
                "tokens_per_second": float(median),
                "quartiles": [float(low), float(high)],
                "first_token": [float(np.median(firsts[index])), max(firsts[index])],
                "to_first": float(np.median(speeds[index] / speeds[0])),
            }
        )
    return rows


def measure_killed(
    load: Load,
    engine: Engine,
    requests: int,
    killed: float,
    clients: int,
    on_answer: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Many short requests of which a share is cut off; then whether all slots are free.

    A tenth of them comes first, after which memory is noted.

    Returns:
      "requests", "killed", "slots", "slots_lost", "memory" (bytes after that tenth and at the end;
      None where the system does not say) and "seconds".
    """
    start, first = time.perf_counter(), max(1, requests // 10)
    count = load.short(first, killed, clients, on_answer)
    settled(engine)
    before = resident_bytes()
    count += load.short(requests - first, killed, clients, on_answer) if requests > first else 0
    settled(engine)
    return {
        "requests": requests,
        "killed": count,
        "slots": engine.num_slots,
        "slots_lost": max(engine.busy_slots, engine.num_jobs),
        "memory": [before, resident_bytes()],
        "seconds": time.perf_counter() - start,
    }


def text_of_clients(rows: Sequence[dict[str, Any]]) -> str:
    """A table of `measure_clients`."""
    lines = ["clients   tokens/s   quartiles           x first   first token: median, largest"]
    for row in rows:
        low, high = row["quartiles"]
        middle, largest = (1e3 * value for value in row["first_token"])
        spread = f"{low:.1f} to {high:.1f}"
        lines.append(
            f"{row['clients']:7d}   {row['tokens_per_second']:8.1f}   {spread:18s}"
            f"  {row['to_first']:6.2f}   {middle:.0f} ms, {largest:.0f} ms"
        )
    return "\n".join(lines)


def text_of_killed(found: dict[str, Any]) -> str:
    """A line of `measure_killed`."""
    before, after = found["memory"]
    memory = "memory is not known here"
    if before is not None:
        memory = (
            f"memory {before / 2**20:.1f} MiB after a tenth of them, {after / 2**20:.1f} at the end"
        )
    free = found["slots"] - found["slots_lost"]
    return (
        f"{found['requests']} requests, {found['killed']} cut off midway, in "
        f"{found['seconds']:.0f} s: {free} of {found['slots']} slots are free; {memory}"
    )
