"""Products of rows with the weights of their experts, against one product for each row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpr_flops import count as flop_count
from tiny_families import hf_config, write_model

from gptvq_jax.core.row_weight import RowWeight
from gptvq_jax.models import experts as moe
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import DecoderBlock, block_forward, run_stage
from gptvq_jax.models.open import open_source


def routed(slots, count, seed=0):
    """Experts of slots, of which the last gets none, and the one before it one slot."""
    experts = np.random.default_rng(seed).integers(count - 2, size=slots)
    experts[slots // 2] = count - 2
    return jnp.asarray(experts, jnp.int32)


@pytest.mark.parametrize("slots, count", [(1, 4), (3, 3), (40, 5), (257, 4), (2000, 3)])
def test_a_block_of_rows_has_slots_of_one_expert_and_every_slot_is_in_one(slots, count):
    experts = routed(slots, count)
    groups = jax.jit(moe.group, static_argnums=1)(experts, count)
    rows = moe.block_rows(slots, count)
    assert len(groups.slots) == rows * len(groups.experts)
    assert len(groups.slots) <= 1.5 * slots  # the work is that of k experts a token, or half more
    filled = np.asarray(groups.slots)
    assert sorted(filled[filled < slots]) == list(range(slots))
    of_rows = np.repeat(np.asarray(groups.experts), rows)
    np.testing.assert_array_equal(
        of_rows[filled < slots], np.asarray(experts)[filled[filled < slots]]
    )
    assert (np.diff(groups.experts) >= 0).all()
    used = (filled < slots).reshape(-1, rows).any(1)
    np.testing.assert_array_equal(np.asarray(groups.experts)[~used], count)  # which cost nothing


def product(x, kernels, experts):
    """Slots (S, in) by the kernels of their experts, sorted into blocks and back."""
    groups = moe.group(experts, len(kernels))
    rows = jnp.take(x, groups.slots, axis=0, mode="fill", fill_value=0)
    made = moe.grouped_matmul(rows, kernels, groups.experts, kernels[0].shape[1])
    return jnp.zeros((len(x), made.shape[1])).at[groups.slots].set(made, mode="drop")


def test_products_and_their_gradients_are_those_of_each_row_by_itself():
    rng = np.random.default_rng(0)
    experts = routed(70, 5)
    x = jnp.asarray(rng.standard_normal((70, 6)), jnp.float32)
    kernels = tuple(jnp.asarray(rng.standard_normal((5, 6, 9)), jnp.float32))
    aim = jnp.asarray(rng.standard_normal((70, 9)), jnp.float32)

    def loss(x, kernels, multiply):
        return jnp.sum(aim * jnp.tanh(multiply(x, kernels)))

    def plain(x, kernels):
        return jnp.einsum("si,sio->so", x, jnp.stack(kernels)[experts], precision="highest")

    grouped = lambda x, kernels: product(x, kernels, experts)  # noqa: E731
    np.testing.assert_allclose(grouped(x, kernels), plain(x, kernels), rtol=0, atol=1e-5)
    found = jax.jit(jax.grad(lambda *a: loss(*a, grouped), (0, 1)))(x, kernels)
    expected = jax.grad(lambda *a: loss(*a, plain), (0, 1))(x, kernels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), found, expected)
    assert not np.any(found[1][-1]) and np.any(found[1][-2])  # of no slot, and of one
    of_rows = tuple(RowWeight(k.T) for k in kernels)
    packed = jax.jit(lambda x: moe.grouped_matmul(x, of_rows, jnp.arange(5), 9))(x[:5])
    np.testing.assert_allclose(
        packed, jnp.einsum("si,sio->so", x[:5], jnp.stack(kernels)), atol=1e-4
    )


def test_an_expert_that_no_row_wants_is_not_even_decoded():
    class Costly:
        """A weight that must not be touched."""

        def __rmatmul__(self, x):
            def fail(x):
                raise AssertionError("decoded")

            shape = jax.ShapeDtypeStruct((len(x), 4), x.dtype)
            return jax.pure_callback(fail, shape, x)

    class Plain:
        def __rmatmul__(self, x):
            return 2 * x

    run = jax.jit(lambda x, e: moe.grouped_matmul(x, [Costly(), Plain()], e, 4))
    np.testing.assert_array_equal(run(jnp.ones((2, 4)), jnp.array([1, 1])), np.full((2, 4), 2.0))


def test_stacked_experts_share_one_branch(tmp_path):
    """And give what they give one by one; a program does not grow with them."""
    sizes = {}
    for count in (4, 16):
        changes = {"num_local_experts": count, "num_hidden_layers": 1}
        source = open_source(str(write_model(tmp_path / str(count), "mixtral", **changes)))
        config, block = source.config, source.block(0)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 48)), jnp.float32)
        rows = {**block, "block_sparse_moe": dict(block["block_sparse_moe"])}
        for number in range(count):
            expert = block["block_sparse_moe"][f"experts_{number}"]
            packed = {n: {"kernel": RowWeight(w["kernel"].T)} for n, w in expert.items()}
            rows["block_sparse_moe"][f"experts_{number}"] = packed
        stacked = moe.stack_experts(config, rows)
        assert set(stacked["block_sparse_moe"]) == {"gate", "experts"}
        sizes[count] = len(str(jax.make_jaxpr(partial(block_forward, config))(stacked, x)))
        if count == 4:
            expected = block_forward(config, block, x)
            found = block_forward(config, stacked, x)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert sizes[16] < 1.1 * sizes[4]
    odd = rows["block_sparse_moe"]["experts_3"]
    for other in (jnp.zeros((48, 31)), odd["w2"]["kernel"].values.astype(jnp.float16)):
        odd["w2"] = {"kernel": RowWeight(other)}
        assert moe.stack_experts(config, rows) is rows


def test_weights_of_a_tokens_experts():
    logits = jnp.array([[0.0, 2.0, 1.0, -1.0]])
    p = np.exp([2.0, 1.0]) / np.exp([0.0, 2.0, 1.0, -1.0]).sum()
    plain, normal = (moe.route(logits, 2, normalize) for normalize in (False, True))
    np.testing.assert_array_equal(plain.experts, [[1, 2]])
    np.testing.assert_allclose(plain.weights, [p], rtol=1e-6)
    np.testing.assert_allclose(normal.weights, [p / p.sum()], rtol=1e-6)


def test_flops_are_those_of_the_experts_of_a_token():
    """Up to rows that fill blocks; not of all experts."""
    config = ModelConfig.from_hf(hf_config("mixtral", num_local_experts=16))
    width = jnp.zeros((1, 2, config.hidden_size))
    block = jax.eval_shape(DecoderBlock(config).init, jax.random.key(0), width)["params"]
    x = jax.ShapeDtypeStruct((2, 64, config.hidden_size), jnp.float32)
    counted = flop_count(lambda b, x: block_forward(config, b, x), block, x)
    expected = flops.block_forward(config, 2, 64)
    filled = 3 * 2 * 128 * 2 * config.hidden_size * config.expert_size
    assert expected <= counted <= expected + filled / 2
    token = jax.ShapeDtypeStruct((1, 1, config.hidden_size), jnp.float32)  # fills no block
    counted = flop_count(lambda b, x: block_forward(config, b, x), block, token)
    assert counted == flops.block_forward(config, 1, 1)
    fewer = ModelConfig.from_hf(hf_config("mixtral"))
    router = 2 * 2 * 128 * config.hidden_size * (16 - 4)
    assert flops.block_forward(fewer, 2, 64) == expected - router


def test_a_block_reads_what_its_stages_say(tmp_path):
    """The last stage asks the router again, and gets the same."""
    source = open_source(str(write_model(tmp_path, "qwen3_moe")))
    config, block = source.config.of_block(0), source.block(0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 48)), jnp.float32)
    at, inner, run = x, None, jax.jit(run_stage, static_argnums=(0, 2))
    for stage in range(4):
        at, inner, read = run(config, block, stage, at, inner)
        if stage == 2:
            first = read
    np.testing.assert_array_equal(first.routes.experts, read.routes.experts)
    assert first.inputs.shape == (2, 7, 48) and read.inputs.shape == (2, 7, 3, 32)
    np.testing.assert_allclose(at, block_forward(config, block, x), rtol=0, atol=1e-5)


def test_half_precision_is_multiplied_as_it_is(tmp_path):
    source = open_source(str(write_model(tmp_path, "mixtral")))
    config, block = source.config, source.block(0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 40, 48)), jnp.float32)
    exact, half = (
        block_forward(config, block, x),
        block_forward(config, block, x.astype("bfloat16")),
    )
    assert half.dtype == jnp.bfloat16
    # A token near the border of two experts may go to the other one.
    errors = np.linalg.norm(np.asarray(half, np.float32) - exact, axis=-1)
    assert np.median(errors / np.linalg.norm(exact, axis=-1)) < 0.02
