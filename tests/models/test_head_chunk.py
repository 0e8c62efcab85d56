"""Nothing of the size tokens x vocabulary is formed where something is computed of all tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny_families import hf_config, random_tokens

from gptvq_jax.models import head_chunk as chunks
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import MOST_BYTES, MOST_TOKENS, head_chunk, pair_chunk
from gptvq_jax.models.llama import DecoderBlock
from gptvq_jax.run.gradients import head_backward
from gptvq_jax.run.token_losses import token_figures, token_nll
from gptvq_jax.serve import loglikelihood
from gptvq_jax.serve.generate import Plan, prefill
from gptvq_jax.serve.sampling import Sampling

GEMMA, BATCH, TIME = 262144, 4, 1024


def config(vocab_size: int) -> ModelConfig:
    fields = {"max_position_embeddings": 2048, "tie_word_embeddings": True}
    return ModelConfig.from_hf(hf_config("gemma3_text", vocab_size=vocab_size, **fields))


def largest(program, *arguments) -> int:
    """Values in the largest array with an axis of the vocabulary that is computed, the table's own
    casts and transposes apart."""
    table = {GEMMA, config(GEMMA).hidden_size}

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
                if is_program(value):
                    yield from sizes(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
            shapes = [variable.aval.shape for variable in equation.outvars]
            yield from (math.prod(s) for s in shapes if GEMMA in s and set(s) != table)

    return max(sizes(jax.make_jaxpr(program)(*arguments).jaxpr), default=0)


def is_program(value) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def of_shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def gemma():
    """A config with Gemma's vocabulary, and its tree without blocks, of shapes."""
    settings = config(GEMMA)
    table = of_shape(GEMMA, settings.hidden_size)
    return settings, {
        "embed_tokens": {"embedding": table},
        "norm": {"scale": of_shape(settings.hidden_size)},
    }


def test_chunks_of_a_vocabulary():
    sizes = [head_chunk(config(vocab), BATCH) for vocab in (64, 49152, GEMMA, 2**29)]
    assert sizes == [MOST_TOKENS, MOST_TOKENS, 32, 1]
    assert [pair_chunk(config(vocab), BATCH) for vocab in (64, 49152, GEMMA)] == [32, 32, 8]
    assert all(head_chunk(config(GEMMA), n) * n * GEMMA * 4 <= MOST_BYTES for n in (1, 3, 16))


def test_losses_gradients_and_comparisons_hold_a_chunk(gemma):
    settings, outer = gemma
    x, tokens = of_shape(BATCH, TIME, settings.hidden_size), of_shape(BATCH, TIME, dtype=jnp.int32)
    logits = MOST_BYTES // 4
    assert largest(lambda *a: token_nll(settings, *a), outer, x, tokens) == logits
    # The last token of a chunk is a target: one more row, padded to another chunk, is not formed.
    assert largest(lambda *a: head_backward(settings, *a), outer, x, tokens) == logits

    def compared(outer, x, tokens):
        return token_figures(settings, outer, x, settings, outer, x, tokens)

    assert largest(compared, outer, x, tokens) == logits // 4


def test_prompts_and_choices_hold_a_chunk(gemma):
    settings, outer = gemma
    block = jax.eval_shape(
        lambda: DecoderBlock(settings.of_block(0)).init(
            jax.random.key(0), jnp.zeros((1, 2, settings.hidden_size))
        )["params"]
    )
    params = outer | {f"layers_{i}": block for i in range(settings.num_hidden_layers)}
    plan = Plan(settings, (1,), Sampling(), TIME + 128, "float32")
    prompts, lengths = of_shape(BATCH, TIME, dtype=jnp.int32), of_shape(BATCH, dtype=jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert largest(lambda *a: prefill(plan, *a), params, prompts, lengths, key) == BATCH * GEMMA

    rows = of_shape(head_chunk(settings, 1), dtype=jnp.int32)
    x = of_shape(BATCH, TIME, settings.hidden_size)
    program = lambda *a: loglikelihood._score(settings, *a)  # noqa: E731
    assert largest(program, outer, x, rows, rows, rows) <= MOST_BYTES // 4


def test_smaller_chunks_give_the_same(monkeypatch):
    settings = config(64)
    rng = np.random.default_rng(0)
    outer = {
        "embed_tokens": {"embedding": rng.standard_normal((64, 48)).astype(np.float32)},
        "norm": {"scale": np.zeros(48, np.float32)},
    }
    x, tokens = rng.standard_normal((2, 70, 48)).astype(np.float32), random_tokens(70, batch=2)

    def results(settings):
        figures = token_figures(settings, outer, x, settings, outer, -x, tokens)
        return figures, head_backward(settings, outer, x, tokens)

    expected = results(settings)
    monkeypatch.setattr(chunks, "MOST_BYTES", 2 * 64 * 4 * 16)
    settings = dataclasses.replace(settings, bos_token_id=7)  # or the programs would be the same
    assert (head_chunk(settings, 2), pair_chunk(settings, 2)) == (16, 4)
    for got, wanted in zip(results(settings), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
