"""Whoever comes and goes, no slot is without room for what a step writes, and none is lost."""

import dataclasses
import random

import numpy as np
import pytest
from tiny_checkpoint import TIED

from gptvq_jax.serve import slot_runner
from gptvq_jax.serve import slots as slots_module
from gptvq_jax.serve.engine import Engine
from gptvq_jax.serve.requests import Request
from gptvq_jax.serve.slot_programs import Drawn, Scores

CONFIG = dataclasses.replace(TIED, num_hidden_layers=1)
VOCAB = CONFIG.vocab_size


class Recorded:
    """Stands for the programs: caches are NumPy arrays (slots, length) of the tokens in them."""

    @staticmethod
    def new_caches(_, batch, length, dtype):
        return np.full((batch, length), -1)

    @staticmethod
    def read_chunk(_, params, caches, tokens, start, rows):
        assert start >= 0 and start + tokens.shape[1] <= caches.shape[1]
        caches = caches.copy()
        caches[0, start : start + tokens.shape[1]] = tokens[0]
        return np.zeros((rows, 1)), caches

    @staticmethod
    def step(_, params, caches, tokens, positions, draws):
        caches = caches.copy()
        assert (positions >= 0).all() and (positions < caches.shape[1]).all()
        caches[np.arange(len(tokens)), positions] = tokens
        return drawn((3 * tokens + positions) % VOCAB, draws), caches

    @staticmethod
    def draw_first(_, params, x, index, draws):
        assert 0 <= index < len(x)
        return drawn(np.array([7]), draws)

    @staticmethod
    def insert(caches, slot, alone):
        caches = caches.copy()
        caches[slot] = alone[0]
        return caches

    @staticmethod
    def extract(caches, slot, _):
        return caches[slot : slot + 1].copy()

    @staticmethod
    def resized(caches, length):
        missing = max(0, length - caches.shape[1])
        return np.pad(caches[:, :length], ((0, 0), (0, missing)), constant_values=-1)


def drawn(tokens, draws):
    count = len(tokens)
    zeros = Scores(np.zeros(count), np.zeros((count, 1), int), np.zeros((count, 1)))
    return Drawn(tokens, draws.keys, np.ones(count, bool), zeros)


class Heard:
    def __init__(self):
        self.tokens, self.end = [], None

    def on_token(self, token, score):
        self.tokens.append(token)
        return False

    def on_end(self, reason):
        self.end = reason


def expected(prompt, count):
    tokens, position = [7], len(prompt)
    while len(tokens) < count:
        tokens.append((3 * tokens[-1] + position) % VOCAB)
        position += 1
    return tokens


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_caches_hold_what_slots_say_whatever_happens(slots, seed, monkeypatch):
    for module in (slot_runner, slots_module):
        monkeypatch.setattr(module, "programs", Recorded)
    monkeypatch.setattr(slots_module, "_SHORTEST", 8)
    monkeypatch.setattr(slots_module, "_WORTH", 3)
    monkeypatch.setattr(slot_runner, "_SHORT", 2)
    rng = random.Random(seed)
    engine = Engine(CONFIG, None, slots=slots, context=64, chunk=4, queue=4)
    texts, waiting, reused = [[rng.randrange(VOCAB) for _ in range(60)] for _ in range(3)], [], 0
    for _ in range(600):
        if rng.random() < 0.15 and engine.num_jobs < engine.most_jobs:
            prompt = tuple(rng.choice(texts)[: rng.choice([1, 4, 5, 8, 20, 31, 32, 33, 50])])
            request = Request(prompt, rng.randint(1, 64 - len(prompt)))
            heard = Heard()
            waiting.append((request, heard, engine.submit((request, heard))[0]))
        if rng.random() < 0.03 and waiting:
            rng.choice(waiting)[2].cancel()
        engine.step()
        held = engine._slots
        rows = [held.alone_caches[0], *([] if held.caches is None else held.caches)]
        for slot, row in zip(held.all, rows, strict=True):
            assert len(slot.tokens) + (slot.job is None) <= len(row)
            assert row[: len(slot.tokens)].tolist() == slot.tokens
        for request, heard, job in [each for each in waiting if each[1].end is not None]:
            whole = expected(request.prompt, request.max_tokens)
            assert heard.end in ("length", "cancelled") and (heard.end == "length") <= (
                heard.tokens == whole
            )
            assert heard.tokens == whole[: len(heard.tokens)]
            reused += job.reused or 0
        waiting = [each for each in waiting if each[1].end is None]
    assert engine.num_jobs == len(waiting)
    assert reused > 0
