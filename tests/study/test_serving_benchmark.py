"""A server is measured as its clients see it, and lost slots are told."""

import json
from types import SimpleNamespace

import pytest

from gptvq_jax.study import serving_benchmark as bench
from gptvq_jax.study import serving_job
from gptvq_jax.study.live_server import Answer, settled


class FakeLoad:
    """Of 10 tokens per second for the first client and 5 for each further, first tokens in turn."""

    def __init__(self, hung_up=0):
        self.calls, self._hung_up = [], hung_up

    def together(self, clients, tokens):
        self.calls.append(clients)
        return 5.0 * (clients + 1), [Answer(tokens, 0.1 * (i + 1), 1.0) for i in range(clients)]

    def short(self, requests, killed, clients, on_answer):
        self.calls.append(requests)
        for _ in range(requests):
            on_answer()
        return round(requests * killed)


def test_numbers_of_clients_take_turns_and_the_first_round_does_not_count():
    load, rounds = FakeLoad(), []
    one, three = bench.measure_clients(load, [1, 3], 4, 2, lambda: rounds.append(1))
    assert load.calls == [1, 3] * 3 and len(rounds) == 3
    assert (one["tokens_per_second"], three["tokens_per_second"], three["to_first"]) == (10, 20, 2)
    assert three["first_token"] == pytest.approx([0.2, 0.3])
    text = bench.text_of_clients([one, three]).splitlines()[-1]
    assert text.split() == ["3", "20.0", "20.0", "to", "20.0", "2.00", "200", "ms,", "300", "ms"]


def test_after_killed_requests_slots_and_memory_are_told():
    load, answers = FakeLoad(), []
    engine = SimpleNamespace(num_jobs=0, busy_slots=0, num_slots=8)
    found = bench.measure_killed(load, engine, 50, 0.2, 4, lambda: answers.append(1))
    assert load.calls == [5, 45] and len(answers) == 50
    assert (found["requests"], found["killed"], found["slots_lost"]) == (50, 10, 0)
    assert "8 of 8 slots are free" in bench.text_of_killed(found)
    known = bench.text_of_killed({**found, "memory": [2**20, 2**21], "slots_lost": 3})
    assert "; memory 1.0 MiB after a tenth of them, 2.0 at the end" in known and "5 of 8" in known
    unknown = bench.text_of_killed({**found, "memory": [None, None]})
    assert unknown.endswith("memory is not known here")


def test_an_engine_that_keeps_a_request_is_not_settled():
    assert settled(SimpleNamespace(num_jobs=0))
    assert not settled(SimpleNamespace(num_jobs=1), seconds=0.02)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("uvicorn")
    import served

    return str(served.write_model(tmp_path_factory.mktemp("checkpoint") / served.NAME))


@pytest.mark.slow
def test_a_live_server_is_measured_and_keeps_no_slot(checkpoint):
    options = {"clients": [1, 2], "tokens": 9, "repeats": 1, "slots": 2, "context": 100}
    found = serving_job.benchmark_serving(
        checkpoint, None, requests=30, killed=0.3, dense=True, **options
    )
    one, two = found["clients"]
    assert (one["clients"], two["clients"]) == (1, 2)
    # Every answer is as long as it may be: it takes longer than its first token.
    assert 0 < one["first_token"][0] < 9 / one["tokens_per_second"]
    killed = found["killed"]
    assert killed["requests"] == 30 and 0 < killed["killed"] < 30 and killed["slots_lost"] == 0
    json.dumps(found)


@pytest.mark.slow
def test_a_lost_slot_ends_in_one_line(checkpoint, monkeypatch):
    lost = {"requests": 1, "killed": 0, "slots": 2, "slots_lost": 1, "memory": [1, 1], "seconds": 1}
    monkeypatch.setattr(serving_job.bench, "measure_killed", lambda *_: lost)
    options = {"clients": [1], "tokens": 2, "repeats": 1, "slots": 2, "context": 100}
    with pytest.raises(ValueError, match="1 of 2 slots are still taken though nobody asks"):
        serving_job.benchmark_serving(checkpoint, None, requests=1, dense=True, **options)
