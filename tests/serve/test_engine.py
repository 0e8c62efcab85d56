"""Continuous batching: the tokens of each request alone, whoever comes and goes."""

import dataclasses
import time

import jax
import numpy as np
import pytest
from tiny_checkpoint import TIED, random_block, write_checkpoint

from gptvq_jax.console.compile_time import PROCESS
from gptvq_jax.models import llama
from gptvq_jax.serve import slot_runner
from gptvq_jax.serve import slots as slots_module
from gptvq_jax.serve.engine import Engine
from gptvq_jax.serve.generate import generate
from gptvq_jax.serve.job_queue import EngineFull
from gptvq_jax.serve.params import dense_params, packed_params
from gptvq_jax.serve.requests import Request
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.serve.slots import cache_lengths
from gptvq_jax.storage.checkpoint import PackedCheckpoint

CHUNK, CONTEXT = 4, 128
PROMPTS = [[5, 9, 3], [7], [*range(10, 22)], [*range(3, 38)], [30, 31], [8, 8, 8, 9]]
CONFIG = dataclasses.replace(TIED, num_hidden_layers=1)


class Heard:
    """A listener that remembers."""

    def __init__(self, enough=10**9):
        self.tokens, self.scores, self.prompt, self.end = [], [], None, None
        self._enough = enough

    def on_prompt(self, scores):
        self.prompt = scores

    def on_token(self, token, score):
        self.tokens.append(token)
        self.scores.append(score)
        return len(self.tokens) >= self._enough

    def on_end(self, reason):
        assert self.end is None
        self.end = reason


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied") / "packed"
    block = random_block(0, CONFIG)
    block["input_layernorm"]["scale"] *= 30  # so that attention decides
    return PackedCheckpoint(write_checkpoint(path, CONFIG, "int8", [block]))


@pytest.fixture(scope="module")
def params(checkpoint):
    return dense_params(checkpoint)


@pytest.fixture(scope="module")
def engine(params):
    """Warm, with caches of three lengths: nothing compiles. Tests leave it without requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots_module, "_SHORTEST", 8)
        patch.setattr(slot_runner, "_SHORT", 2)
        made = Engine(CONFIG, params, slots=3, context=CONTEXT, chunk=CHUNK, queue=6)
    done = []
    made.warm_up(lambda: done.append(1))
    assert len(done) == made.num_programs() == 3 * 4 + 2

    def compiling_nothing(method):
        def call(*arguments):
            start = time.perf_counter()
            jobs = method(*arguments)
            assert PROCESS.since(start) == 0
            return jobs

        return call

    made.step, made.submit = compiling_nothing(made.step), compiling_nothing(made.submit)
    return made


def run(engine, *requests, enough=10**9):
    heard = [Heard(enough) for _ in requests]
    engine.submit(*zip(requests, heard, strict=True))
    finish(engine)
    return heard


def finish(engine):
    while engine.num_jobs:
        engine.step()


def expected(params, prompt, **options):
    return generate(CONFIG, params, [prompt], **{"max_tokens": 20, **options}).tokens[0]


def test_lengths_rise_by_4_up_to_the_context():
    assert cache_lengths(2048, 64) == (512, 2112)
    assert cache_lengths(8192, 64) == (512, 2048, 8256)
    assert cache_lengths(100, 64) == (164,)
    assert cache_lengths(1024, 256) == (1280,)


def test_bytes_of_the_caches_are_counted(engine):
    slots = engine._slots
    arrays = jax.tree.leaves((slots.alone_caches, slots.caches))
    assert engine.cache_bytes[0] == sum(a.nbytes for a in arrays) * 8 // slots.length
    assert engine.cache_bytes[1] == engine.cache_bytes[0] * 132 // 8


def test_together_they_get_the_tokens_of_each_alone(engine, params):
    heard = run(engine, *(Request(tuple(prompt), 20) for prompt in PROMPTS))
    assert [each.end for each in heard] == ["length"] * len(PROMPTS)
    for prompt, each in zip(PROMPTS, heard, strict=True):
        assert each.tokens == expected(params, prompt)
    assert len({token for each in heard for token in each.tokens}) > 5


def test_newcomers_join_between_steps_through_all_lengths(engine, params):
    first, second = Heard(), Heard()
    engine.submit((Request((5, 9, 3), 100), first))
    for _ in range(30):
        engine.step()
    assert len(first.tokens) == 31  # the first step made two: that of the prompt, and the next
    engine.submit((Request((7,), 40), second))
    engine.step()
    assert (len(first.tokens), len(second.tokens)) == (32, 2)
    finish(engine)
    assert first.tokens == expected(params, [5, 9, 3], max_tokens=100)
    assert second.tokens == expected(params, [7], max_tokens=40)


def test_a_prompt_is_read_beside_the_steps_of_others(engine):
    first, second = Heard(), Heard()
    engine.submit((Request((6, 4), 60), first))
    for _ in range(9):
        engine.step()
    before = dataclasses.replace(engine.counts)
    engine.submit((Request(tuple(np.arange(50) % 40), 5), second))
    chunks = -(-50 // CHUNK)
    for count in range(1, chunks):
        engine.step()
        assert len(first.tokens) == 10 + count and not second.tokens
    engine.step()
    assert (len(first.tokens), len(second.tokens)) == (10 + chunks, 2)
    assert engine.counts.chunks - before.chunks == chunks
    assert engine.counts.read - before.read == 50
    assert engine.counts.rows_read - before.rows_read == 50  # 12 x 4 and, by the short program, 2
    finish(engine)


def test_who_is_alone_waits_for_no_empty_slots(engine):
    before = dataclasses.replace(engine.counts)
    run(engine, Request((11, 12), 9))
    assert engine.counts.steps - before.steps == 8 == engine.counts.slot_steps - before.slot_steps
    heard = Heard(), Heard()
    engine.submit((Request((1, 2), 6), heard[0]), (Request((2, 1), 50), heard[1]))
    while heard[0].end is None:
        engine.step()
    before = dataclasses.replace(engine.counts)
    engine.step()
    engine.step()
    assert engine.counts.slot_steps - before.slot_steps == 2
    assert engine.counts.copies - before.copies == 1
    finish(engine)


def test_draws_are_those_of_generate_whoever_else_is_there(engine, params):
    sampling = [Sampling(5.0), Sampling(2.0, 0, 0.7), Sampling()]
    heard = run(engine, *(Request((5, 9, 3), 15, s, seed=7) for s in sampling))
    tokens = [each.tokens for each in heard]
    for s, found in zip(sampling, tokens, strict=True):
        assert found == expected(params, [5, 9, 3], max_tokens=15, sampling=s, seed=7)
    (other,) = run(engine, Request((5, 9, 3), 15, sampling[0], seed=8))
    assert other.tokens != tokens[0]
    (cut,) = run(engine, Request((5, 9, 3), 15, Sampling(5.0, top_k=1), seed=7))
    assert cut.tokens == tokens[2]


def full_forward(checkpoint, tokens):
    """Log-probabilities (time, vocab) of next tokens."""
    params = {"layers_0": checkpoint.block(0)} | checkpoint.outer()
    logits = llama.Decoder(CONFIG).apply({"params": params}, np.array([tokens]))
    return np.asarray(jax.nn.log_softmax(logits[0]))


def test_scores_are_those_of_the_full_forward(engine, checkpoint):
    prompt = tuple(PROMPTS[2])
    scored = Request(prompt, 6, Sampling(1.5), seed=1, scored=True, score_prompt=True)
    one, other = run(engine, scored, Request((1, 4), 6))
    of_all = full_forward(checkpoint, [*prompt, *one.tokens])
    targets = [*prompt[1:], *one.tokens]
    found = [*one.prompt, *one.scores]
    assert len(found) == len(targets)
    for row, target, score in zip(of_all, targets, found, strict=False):
        assert score.logprob == pytest.approx(row[target], abs=1e-4)
        best, logprob = score.likeliest[0]
        assert best == row.argmax() and logprob == pytest.approx(row.max(), abs=1e-4)
        assert len(score.likeliest) == 20
        assert dict(score.likeliest).get(target, score.logprob) == score.logprob
    assert other.prompt is None and other.scores == [None] * 6


def test_a_prompt_may_be_scored_without_new_tokens(engine):
    (heard,) = run(engine, Request((5, 9, 3), 0, score_prompt=True))
    assert (heard.tokens, heard.end, len(heard.prompt)) == ([], "length", 2)
    (heard,) = run(engine, Request((1,) * CONTEXT, 0))
    assert (heard.tokens, heard.end, heard.prompt) == ([], "length", None)


def test_what_was_read_is_not_read_again(engine, params):
    prompt = tuple(range(1, 31))
    (first,) = run(engine, Request(prompt, 10))
    longer = (*prompt, *first.tokens, 4, 5)
    before = dataclasses.replace(engine.counts)
    (second,) = run(engine, Request(longer, 10))
    # The newest token of an answer has been through no layer.
    assert engine.counts.reused - before.reused == 39
    assert engine.counts.read - before.read == len(longer) - 39
    assert second.tokens == expected(params, list(longer), max_tokens=10)
    # Nor where others came in between, as far as their caches are as long.
    run(engine, Request(tuple(range(39, 14, -1)), 6), Request((2, 9), 3))
    before = dataclasses.replace(engine.counts)
    (third,) = run(engine, Request(longer, 10))
    assert engine.counts.reused - before.reused == 31
    assert third.tokens == second.tokens


def test_a_stop_token_and_enough_end_a_request_alone(params):
    free = Engine(CONFIG, params, slots=2, context=60, chunk=CHUNK)
    tokens = [each.tokens for each in run(free, *(Request(tuple(p), 20) for p in PROMPTS[:2]))]
    stop = next(t for t in tokens[0] if t not in tokens[1][:2])
    at = tokens[0].index(stop)
    stopping = Engine(CONFIG, params, slots=2, context=60, chunk=CHUNK, stop_tokens=[stop])
    heard = run(stopping, *(Request(tuple(p), 20) for p in PROMPTS[:2]))
    assert (heard[0].tokens, heard[0].end) == (tokens[0][:at], "stop")
    assert len(heard[1].tokens) >= 2
    (heard,) = run(free, Request(tuple(PROMPTS[0]), 20), enough=3)
    assert (heard.tokens, heard.end) == (tokens[0][:3], "stop")


@pytest.mark.parametrize("steps", [0, 1, 3, 12])
def test_who_is_cancelled_frees_the_slot(engine, steps):
    heard = [Heard() for _ in range(4)]
    jobs = engine.submit(*((Request(tuple(range(20)), 40), each) for each in heard))
    for _ in range(steps):
        engine.step()
    for job in jobs[:3]:
        job.cancel()
    engine.step()
    assert [each.end for each in heard] == ["cancelled"] * 3 + [None]
    assert engine.num_jobs == 1
    finish(engine)
    assert len(heard[3].tokens) == 40


def test_a_full_queue_takes_all_or_none(engine):
    heard = [Heard() for _ in range(10)]
    pairs = [(Request((3, 4), 2), each) for each in heard]
    engine.submit(*pairs[:8])
    with pytest.raises(EngineFull, match="8 requests are worked on or wait already"):
        engine.submit(*pairs[8:])
    engine.submit(pairs[8])
    finish(engine)
    assert [each.end for each in heard] == ["length"] * 9 + [None]


def test_a_listener_that_fails_costs_its_request(engine):
    class Broken(Heard):
        def on_token(self, *_):
            raise RuntimeError("no\nmore")

    broken, other = Broken(), Heard()
    engine.submit((Request((3, 4), 9), broken), (Request((4, 3), 9), other))
    finish(engine)
    assert broken.end == "error: no (RuntimeError)" and len(other.tokens) == 9


def test_scores_that_are_no_numbers_cost_their_request(checkpoint):
    params = dense_params(checkpoint)
    table = params["embed_tokens"]["embedding"]
    spoiled = dataclasses.replace(table, values=table.values.at[39].set(np.nan))
    head = {"lm_head": {"kernel": table}}
    untied = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    params = params | {"embed_tokens": {"embedding": spoiled}} | head
    engine = Engine(untied, params, slots=2, context=60, chunk=CHUNK)
    good = run(engine, Request((5, 9, 3), 10), Request((5, 4), 10))
    for prompt in [(39,), (5, 9, 39)]:
        found = run(engine, Request(prompt, 10), Request((5, 4), 10))
        assert found[0].end.startswith("error: the model's scores are not finite")
        assert found[1].tokens == good[1].tokens
    again = run(engine, Request((5, 9, 3), 10), Request((5, 4), 10))
    assert [each.tokens for each in again] == [each.tokens for each in good]


def test_a_program_that_fails_ends_what_is_there_and_nothing_else(engine, monkeypatch):
    heard, later = Heard(), Heard()
    engine.submit((Request((3, 4), 9), heard))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr("gptvq_jax.serve.slot_programs.step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert heard.end == "error: division by zero (ZeroDivisionError)" and not engine.num_jobs
    engine.submit((Request((3, 4), 9), later))
    finish(engine)
    assert later.end == "length"


def test_the_end(params):
    engine = Engine(CONFIG, params, slots=1, context=60, chunk=CHUNK)
    heard = [Heard() for _ in range(3)]
    engine.submit(*((Request((3, 4), 9), each) for each in heard))
    engine.step()
    engine.close()
    engine.step()
    assert [each.end for each in heard] == ["closed"] * 3 and engine.num_jobs == 0
    with pytest.raises(EngineFull, match="closed"):
        engine.submit((Request((3,), 1), Heard()))


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request((), 1), "prompt 0 is empty"),
        (Request((1,), -1), "max_tokens=-1 must be at least 1"),
        (Request((1, 40), 1), r"outside 0\.\.39"),
        (Request((1,) * 100, 29), "100 tokens; with max_tokens=29 .* 128 positions"),
        (Request((1,), 1, seed=-1), "seed=-1 must be from 0"),
    ],
)
def test_bad_requests(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.submit((request_, Heard()))
    assert engine.num_jobs == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"queue": -1}, "queue=-1 must be at least 0"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"context": 2049}, "context=2049 must be from 2 to 2048"),
        ({"context": 1}, "context=1 must be from 2"),
    ],
)
def test_bad_options(params, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(CONFIG, params, **{"slots": 2, **options})


@pytest.mark.slow
def test_packed_weights(checkpoint):
    packed = packed_params(checkpoint, "reference")
    engine = Engine(CONFIG, packed, slots=3, context=60, chunk=CHUNK)
    heard = run(engine, *(Request(tuple(prompt), 12) for prompt in PROMPTS))
    for prompt, each in zip(PROMPTS, heard, strict=True):
        assert each.tokens == generate(CONFIG, packed, [prompt], max_tokens=12).tokens[0]
