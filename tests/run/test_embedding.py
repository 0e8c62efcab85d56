"""What is looked up, and what of it reaches the device."""

import jax
import numpy as np
import pytest

from gptvq_jax.models.llama import embed, head_logits
from gptvq_jax.models.open import open_source
from gptvq_jax.run import activations
from gptvq_jax.run.embedding import head_on_device, rows_of, write_embeddings


def test_rows_are_those_of_the_model(model_dir, tmp_path):
    source = open_source(str(model_dir))
    outer = source.outer()
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (3, 7), np.int32)
    expected = np.asarray(embed(source.config, outer, tokens))
    rows = rows_of(source.config, outer, tokens)
    assert isinstance(rows, np.ndarray)
    np.testing.assert_array_equal(rows, expected)
    shape = (*tokens.shape, source.config.hidden_size)
    with activations.writing(tmp_path / "x.npy", shape, activations.FLOAT32) as out:
        write_embeddings(source.config, outer, tokens, out)
    np.testing.assert_array_equal(activations.Activations(tmp_path / "x.npy")[:], expected)


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_that_does_not_exist(model_dir, token):
    config = open_source(str(model_dir)).config
    outer = {"embed_tokens": {"embedding": np.zeros((5, 2), np.float32)}}
    with pytest.raises(ValueError, match="must be within the vocabulary of 5"):
        rows_of(config, outer, np.array([[0, token, 4]]))
    assert rows_of(config, outer, np.zeros((2, 0), int)).shape == (2, 0, 2)


def test_only_what_the_head_reads_is_sent(model_dir):
    source = open_source(str(model_dir))
    config, outer = source.config, source.outer()
    head = head_on_device(config, outer)
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    assert set(head) == {"norm", name}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(head))
    x = np.random.default_rng(0).standard_normal((1, 4, config.hidden_size)).astype(np.float32)
    np.testing.assert_array_equal(head_logits(config, head, x), head_logits(config, outer, x))
