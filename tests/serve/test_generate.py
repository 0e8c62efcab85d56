"""Generation against the full forward pass, from packed and dense weights, alone and in batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import TIED, embedding_checkpoints, write_checkpoint

from gptvq_jax.models import llama
from gptvq_jax.serve import generate as driver
from gptvq_jax.serve.generate import generate
from gptvq_jax.serve.params import dense_params, packed_params
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.storage.checkpoint import PackedCheckpoint

PROMPTS = [[5, 9, 3], [7], list(range(10, 22))]  # padded to 16 tokens alone and together
STEPS = 19  # more than two calls


checkpoint = embedding_checkpoints()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied") / "packed"
    config = dataclasses.replace(TIED, num_hidden_layers=1)  # has every kind of packed layer
    return PackedCheckpoint(write_checkpoint(path, config, "int8"))


@pytest.fixture(scope="module")
def params(tied):
    """Dense, which compile fast: what the driver does is the same for both."""
    return dense_params(tied)


def greedy_by_full_forward(source, prompt, steps):
    """Tokens of the whole model run again for each of them, and by how much each won."""
    params = {f"layers_{i}": source.block(i) for i in range(source.config.num_hidden_layers)}
    forward = jax.jit(llama.Decoder(source.config).apply)
    tokens = np.zeros((1, len(prompt) + steps), np.int32)  # what follows changes no logits
    tokens[0, : len(prompt)] = prompt
    margins = []
    for end in range(len(prompt), len(prompt) + steps):
        logits = np.asarray(forward({"params": params | source.outer()}, tokens))[0, end - 1]
        tokens[0, end] = logits.argmax()
        margins.append(np.diff(np.sort(logits)[-2:])[0])
    return tokens[0, len(prompt) :].tolist(), min(margins)


def test_greedy_packed_equals_dequantized_equals_the_full_forward(checkpoint):
    config = checkpoint.config
    packed = generate(config, packed_params(checkpoint, "reference"), PROMPTS, max_tokens=STEPS)
    dense = generate(config, dense_params(checkpoint), PROMPTS, max_tokens=STEPS)
    assert packed.tokens == dense.tokens
    for prompt, tokens in zip(PROMPTS, packed.tokens, strict=True):
        expected, margin = greedy_by_full_forward(checkpoint, prompt, STEPS)
        assert margin > 1e-4  # no tie that rounding could break
        assert tokens == expected


def test_a_batch_equals_its_prompts_one_by_one(tied):
    params = packed_params(tied, "reference")
    batch = generate(tied.config, params, PROMPTS, max_tokens=STEPS)
    for prompt, tokens in zip(PROMPTS, batch.tokens, strict=True):
        assert generate(tied.config, params, [prompt], max_tokens=STEPS).tokens == [tokens]


def test_implementations_agree(tied):
    params = packed_params(tied, "reference")
    expected = generate(tied.config, params, PROMPTS[:1], max_tokens=STEPS).tokens
    xla = packed_params(tied, "xla")
    assert generate(tied.config, xla, PROMPTS[:1], max_tokens=STEPS).tokens == expected


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17])
def test_number_of_tokens(tied, params, count):
    result = generate(tied.config, params, PROMPTS[:1], max_tokens=count)
    longer = generate(tied.config, params, PROMPTS[:1], max_tokens=STEPS)
    assert result.tokens[0] == longer.tokens[0][:count]
    assert result.decoded == count - 1
    assert (result.tokens_per_second > 0) == (count > 1)


def test_a_stop_token_ends_its_sequence_alone(tied, params):
    free = generate(tied.config, params, PROMPTS, max_tokens=STEPS).tokens
    stop = free[0][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(expected[0]) < max(map(len, expected))  # one ends before another
    stopped = generate(tied.config, params, PROMPTS, max_tokens=STEPS, stop_tokens=[stop, 1000])
    assert stopped.tokens == expected
    made = sum(min(len(row) + 1, STEPS) for row in expected)
    assert stopped.decoded == made - len(PROMPTS)


def test_steps_end_when_every_sequence_has(tied, params, monkeypatch):
    first = generate(tied.config, params, PROMPTS[:1], max_tokens=1).tokens[0][0]
    monkeypatch.setattr(driver, "decode", None)  # not to be called
    result = generate(tied.config, params, PROMPTS[:1], max_tokens=STEPS, stop_tokens=[first])
    assert result.tokens == [[]]


def test_tokens_are_handed_out_as_they_are_made(tied, params):
    seen = []
    result = generate(tied.config, params, PROMPTS, max_tokens=STEPS, on_tokens=seen.append)
    assert [len(new[0]) for new in seen] == [1, 8, 8, 2]
    joined = [sum(rows, []) for rows in zip(*seen, strict=True)]
    assert joined == result.tokens


def test_steps_end_when_nobody_wants_more(tied, params):
    seen = []

    def second(new):
        seen.append(new)
        return len(seen) == 2

    stopped = generate(tied.config, params, PROMPTS, max_tokens=STEPS, on_tokens=second)
    free = generate(tied.config, params, PROMPTS, max_tokens=STEPS)
    assert stopped.tokens == [row[:9] for row in free.tokens] and len(seen) == 2


def test_draws_follow_the_seed_and_the_settings(tied, params):
    def draw(seed=0, **fields):
        sampling = Sampling(**{"temperature": 5.0, **fields})
        kwargs = {"max_tokens": STEPS, "sampling": sampling, "seed": seed}
        return generate(tied.config, params, PROMPTS[:1], **kwargs).tokens[0]

    greedy = generate(tied.config, params, PROMPTS[:1], max_tokens=STEPS).tokens[0]
    assert draw() == draw() != draw(seed=1)
    assert draw() != greedy
    assert len(set(draw(temperature=1e4))) > 5  # every step draws anew
    assert draw(top_k=1) == greedy
    assert draw(top_p=1e-6) == greedy


@pytest.mark.parametrize("dense", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bfloat16(tied, dense):
    weights = dense_params(tied, "bfloat16") if dense else packed_params(tied, "reference")
    plan = driver.Plan(tied.config, (), Sampling(), max_len=32, dtype="bfloat16")
    inputs = (weights, np.zeros((1, 16), np.int32), np.array([3]), jax.random.key(0))
    state = driver.prefill(plan, *inputs)
    assert {cache.k.dtype for cache in state.caches} == {jnp.dtype(jnp.bfloat16)}
    result = generate(tied.config, weights, PROMPTS, max_tokens=3, dtype="bfloat16")
    assert [len(tokens) for tokens in result.tokens] == [3, 3, 3]


def test_compiling_first_changes_nothing_else(tied, params):
    plain = generate(tied.config, params, PROMPTS, max_tokens=STEPS)
    timed = generate(tied.config, params, PROMPTS, max_tokens=STEPS, compile_first=True)
    assert timed.tokens == plain.tokens
    assert timed.compile_seconds > plain.compile_seconds == 0


@pytest.mark.parametrize(
    "prompts, max_tokens, message",
    [
        ([], 1, "there is no prompt"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1]], 0, "max_tokens=0 must be at least 1"),
        ([[1] * 2000], 49, r"prompt 0 has 2000 tokens; with max_tokens=49 .* 2048 positions"),
        ([[1, 40]], 1, r"prompt 0 has a token outside 0\.\.39"),
        ([[-1]], 1, r"prompt 0 has a token outside 0\.\.39"),
    ],
)
def test_bad_prompts_raise(params, prompts, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(TIED, params, prompts, max_tokens=max_tokens)
