"""The loss of a packed model with adapters, and its gradient with respect to them alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_adapter import random_adapter
from tiny_checkpoint import MODEL, TIED, random_block, random_tensor, write_checkpoint
from tiny_families import random_tokens, write_model

from gptvq_jax.lora.frozen_model import FrozenModel
from gptvq_jax.lora.leaf import DroppedLora
from gptvq_jax.models.llama import Decoder, get_layer, with_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.ops.lora import LoraKernel
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.dequantize import dequantize_tree
from gptvq_jax.study.sample_tensors import TensorFormat

SCALE = 2.0
FORMAT = TensorFormat(dim=2, index_bits=4, codebook_bits=8)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One codebook, and a trellis in each block; the head is the embedding, int8."""
    blocks = [
        with_layer(random_block(i, TIED, FORMAT), "mlp/up_proj", random_tensor("trellis", 52, 36))
        for i in range(2)
    ]
    path = tmp_path_factory.mktemp("checkpoint") / "packed"
    return PackedCheckpoint(write_checkpoint(path, TIED, "int8", blocks))


@pytest.fixture(scope="module")
def model(checkpoint):
    return FrozenModel(checkpoint, SCALE)


@pytest.fixture(scope="module")
def adapters():
    return {
        name: {"a": jnp.asarray(layer.a), "b": jnp.asarray(layer.b)}
        for name, layer in random_adapter(MODEL).layers.items()
    }


@pytest.fixture(scope="module")
def batch():
    draws = np.random.default_rng(1)
    tokens = draws.integers(MODEL.vocab_size, size=(3, 12)).astype(np.int32)
    return tokens, draws.random((3, 11)) < 0.6


def dense_tree(checkpoint):
    blocks = range(checkpoint.config.num_hidden_layers)
    packed = {f"layers_{i}": checkpoint.packed_block(i) for i in blocks}
    return checkpoint.outer() | dequantize_tree(packed)


def definition(config, params, adapters, tokens, learned):
    """The mean loss of the whole dense model with W + s B A, by the definition."""
    for name, leaf in adapters.items():
        block, _, within = name.partition("/")
        kernel = get_layer(params[block], within)["kernel"]
        added = SCALE * jnp.matmul(leaf["b"], leaf["a"], precision="highest").T
        params = {**params, block: with_layer(params[block], within, kernel + added)}
    logits = Decoder(config).apply({"params": params}, tokens)[:, :-1]
    logs = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(nll * learned) / learned.sum()


def test_loss_and_gradient_are_those_of_the_merged_dense_model(checkpoint, model, adapters, batch):
    loss, gradient = model.loss_and_gradient(adapters, *batch, KEY, 0.0)
    loss_of = jax.jit(jax.value_and_grad(partial(definition, TIED), argnums=1))
    expected, of_dense = loss_of(dense_tree(checkpoint), adapters, *batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert gradient.keys() == adapters.keys()
    for name, leaf in gradient.items():
        for part in ("a", "b"):
            size = np.abs(of_dense[name][part]).max()
            assert size > 0
            np.testing.assert_allclose(leaf[part], of_dense[name][part], atol=2e-4 * size)
    tokens, learned = batch
    np.testing.assert_allclose(model.loss(adapters, *batch) / learned.sum(), expected, rtol=1e-5)


def test_the_gradient_predicts_small_changes_of_the_loss(model, adapters, batch):
    tokens, learned = batch
    _, gradient = model.loss_and_gradient(adapters, *batch, KEY, 0.0)
    size = float(jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))))
    step = 0.02 / size

    def loss(sign):
        moved = jax.tree.map(lambda p, g: p + sign * step * g / size, adapters, gradient)
        return model.loss(moved, tokens, learned) / learned.sum()

    np.testing.assert_allclose((loss(1) - loss(-1)) / (2 * step), size, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "phi3"])
def test_gradients_of_other_families(family, tmp_path):
    source = open_source(str(write_model(tmp_path, family)))
    of_family = FrozenModel(source, SCALE)
    adapters = {
        name: {"a": jnp.asarray(layer.a), "b": jnp.asarray(layer.b)}
        for name, layer in random_adapter(source.config, ("q_proj", "o_proj")).layers.items()
    }
    tokens = random_tokens(12, batch=2).astype(np.int32)
    learned = np.ones((2, 11), bool)
    loss, gradient = of_family.loss_and_gradient(adapters, tokens, learned, KEY, 0.0)
    params = {f"layers_{i}": source.block(i) for i in range(source.config.num_hidden_layers)}
    loss_of = jax.jit(jax.value_and_grad(partial(definition, source.config), argnums=1))
    expected, of_dense = loss_of(source.outer() | params, adapters, tokens, learned)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(of_dense), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-3 * np.abs(right).max())


def test_blocks_below_the_lowest_adapter_are_not_gone_down_to(model, adapters, batch):
    upper = {name: leaf for name, leaf in adapters.items() if name.startswith("layers_1")}
    loss, gradient = model.loss_and_gradient(upper, *batch, KEY, 0.0)
    assert gradient.keys() == upper.keys()
    assert float(loss) == pytest.approx(model.loss(upper, *batch) / batch[1].sum(), rel=1e-5)


def test_dropout_is_of_what_the_adapter_reads(model, adapters, batch):
    same = [float(model.loss_and_gradient(adapters, *batch, KEY, 0.3)[0]) for _ in range(2)]
    other = float(model.loss_and_gradient(adapters, *batch, jax.random.key(1), 0.3)[0])
    assert same[0] == same[1] != other
    x = jax.random.normal(KEY, (5, 8))
    a, b = jnp.ones((2, 8)), jnp.ones((4, 2))
    base = jnp.zeros((8, 4))
    dropped = np.asarray(x @ DroppedLora(base, a, b, jnp.float32(1), KEY, 0.5))
    kept = jax.random.bernoulli(KEY, 0.5, x.shape)
    expected = 2 * np.where(kept, 2 * x, 0).sum(1)
    np.testing.assert_allclose(dropped, np.repeat(expected[:, None], 4, 1), rtol=1e-5)
    whole = np.asarray(x @ LoraKernel(base, a, b, jnp.float32(1)))
    np.testing.assert_allclose(whole[:, 0], 2 * x.sum(1), rtol=1e-4, atol=1e-5)
