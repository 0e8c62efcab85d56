"""Log-likelihoods in batches, against every logit of each text alone, in float64."""

import itertools

import jax
import numpy as np
import pytest
from tiny_checkpoint import MODEL, write_checkpoint

from gptvq_jax.models.head_chunk import head_chunk
from gptvq_jax.models.llama import block_forward
from gptvq_jax.quantized_model import QuantizedModel
from gptvq_jax.serve import loglikelihood
from gptvq_jax.serve.lengths import padded_length
from gptvq_jax.serve.loglikelihood import plan_batches, score_batch

VOCAB = MODEL.vocab_size


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "packed")
    return QuantizedModel(path, "xla")


def draw(rng, *lengths):
    return [rng.integers(VOCAB, size=length).tolist() for length in lengths]


def scores(model, pairs, batch_size=3, max_length=64, dtype="float32"):
    found = {}
    for batch in plan_batches(pairs, batch_size, max_length):
        found |= score_batch(model.config, model._params, batch, dtype)
    return [found[index] for index in range(len(pairs))]


def expected(model, context, continuation):
    """(log-probability, greedy) from the logits of one text, padded, which changes no logit."""
    tokens = np.zeros((1, 64), np.int32)
    text = [*context, *continuation]
    tokens[0, : len(text)] = text
    logits = np.asarray(model.logits(tokens)[0], np.float64)[len(context) - 1 : len(text) - 1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = logprobs[np.arange(len(continuation)), continuation]
    return picked.sum(), bool((logits.argmax(-1) == continuation).all())


def agree(model, pairs, found):
    for (context, continuation), score in zip(pairs, found, strict=True):
        logprob, greedy = expected(model, context, continuation)
        assert score.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-4)
        assert score.greedy == greedy


def test_batches_against_each_text_alone(model):
    rng = np.random.default_rng(0)
    pairs = [
        draw(rng, *lengths) for lengths in [(1, 1), (5, 3), (30, 1), (2, 20), (40, 10), (9, 9)]
    ]
    # One that is greedy, one whose last token is not.
    context = draw(rng, 7)[0]
    likeliest = []
    for _ in range(3):
        tokens = np.zeros((1, 64), np.int32)
        text = context + likeliest
        tokens[0, : len(text)] = text
        likeliest.append(int(np.argmax(model.logits(tokens)[0, len(text) - 1])))
    pairs += [(context, likeliest), (context, [*likeliest[:2], (likeliest[2] + 1) % VOCAB])]
    found = scores(model, pairs)
    agree(model, pairs, found)
    assert found[-2].greedy and not found[-1].greedy


def test_more_predictions_than_the_head_takes_at_once(model):
    pairs = [draw(np.random.default_rng(i), 1, 60) for i in range(3)]
    (batch,) = plan_batches(pairs, 3, 64)
    assert len(batch.rows) > head_chunk(model.config, 1)
    agree(model, pairs, scores(model, pairs))


def test_pairs_that_differ_in_the_last_token_are_one_text(model):
    (context, other) = draw(np.random.default_rng(1), 10, 4)
    letters = [(context, [token]) for token in range(6)]
    words = [(context, [*other, token]) for token in range(3)]
    # Where the context ends does not matter to the model.
    pairs = [*letters, *words, ([*context, *other], [9])]
    (batch,) = plan_batches(pairs, 2, 64)
    assert batch.tokens.shape == (2, padded_length(14))
    assert len(batch.rows) == 6 + 3 * 5 + 1
    agree(model, pairs, scores(model, pairs, batch_size=2))


def test_what_is_too_long_is_cut_on_the_left(model):
    rng = np.random.default_rng(2)
    context, continuation = draw(rng, 40, 5)
    (score,) = scores(model, [(context, continuation)], max_length=20)
    kept = context[-(20 + 1 - 5) :]
    (cut,) = scores(model, [(kept, continuation)])
    assert score == cut
    assert score.logprob != pytest.approx(expected(model, context, continuation)[0], abs=1e-3)
    # A continuation as long as what the model reads keeps one token of the context.
    (batch,) = plan_batches([(context, continuation)], 1, 5)
    assert batch.tokens[0].tolist() == [context[-1], *continuation[:-1]]


def test_batches_of_any_size_agree(model):
    rng = np.random.default_rng(3)
    pairs = [draw(rng, int(n), 1 + int(n) % 4) for n in rng.integers(1, 50, size=9)]
    alone, together = scores(model, pairs, 1), scores(model, pairs, 9)
    for one, other in zip(alone, together, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.greedy == other.greedy


def test_many_lengths_share_few_programs(model):
    """As many as lengths that texts are padded to, for each of the two kinds of block."""
    jax.clear_caches()
    rng = np.random.default_rng(4)
    pairs = [draw(rng, length, 2) for length in range(1, 46)]
    scores(model, pairs, batch_size=5)
    sizes = {padded_length(length + 1) for length in range(1, 46)}
    assert len(sizes) == 4
    blocks = [jax.eval_shape(lambda b: b, model._params[f"layers_{i}"]) for i in range(2)]
    kinds = {repr(block) for block in blocks}  # how many codes a trellis has differs
    assert block_forward._cache_size() == len(kinds) * len(sizes)
    assert loglikelihood._score._cache_size() == len(sizes)


def test_the_longest_come_first_and_nothing_beyond_the_positions():
    pairs = [([1] * n, [2]) for n in (3, 60, 17, 100)]
    batches = plan_batches(pairs, 2, 70)
    assert [batch.tokens.shape for batch in batches] == [(2, 70), (2, 24)]
    assert [sorted(set(batch.owners.tolist())) for batch in batches] == [[1, 3], [0, 2]]
    work = [batch.flops(MODEL) for batch in batches]
    assert work[0] > 2 * work[1]


def test_bfloat16_is_near(model):
    pairs = [draw(np.random.default_rng(5), 6, 3)]
    (exact,), (rounded,) = scores(model, pairs), scores(model, pairs, dtype="bfloat16")
    assert rounded.logprob != exact.logprob
    assert rounded.logprob == pytest.approx(exact.logprob, rel=0.1)


@pytest.mark.parametrize(
    "pair, message",
    [
        (([], [1]), "the context of request 1 has no tokens"),
        (([1], []), "the continuation of request 1 has no tokens"),
        (([1], [2] * 9), "continuation of request 1 has 9 tokens, more than .* which is 8"),
    ],
)
def test_bad_pairs(pair, message):
    with pytest.raises(ValueError, match=message):
        plan_batches([([1], [2]), pair], 1, 8)


def test_no_pairs():
    assert list(itertools.chain(plan_batches([], 4, 8))) == []
