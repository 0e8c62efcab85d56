"""The decoder against transformers' PyTorch models, a float64 NumPy block, and its own pieces."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import CONFIGS, random_params, random_tokens, torch_logits, torch_model
from transformers import LlamaConfig

from gptvq_jax.models import llama, stages
from gptvq_jax.models.attention import causal_attention
from gptvq_jax.models.config import Llama3RopeScaling, ModelConfig
from gptvq_jax.models.rope import inverse_frequencies

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def run(config, params, tokens):
    return np.asarray(jax.jit(llama.Decoder(config).apply)({"params": params}, tokens))


def activations(config, time, seed=0, batch=2):
    x = np.random.RandomState(seed).standard_normal((batch, time, config.hidden_size))
    return jnp.asarray(x, jnp.float32)


# --- the whole model ---


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_match_transformers(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = CONFIGS[name]
    params = random_params(config, seed=1)
    tokens = random_tokens(config, seed=1, batch=2)
    model = torch_model(config, params, tmp_path)
    assert ModelConfig.from_hf(model.config.to_dict()) == config
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}

    expected, actual = torch_logits(model, tokens), run(config, params, tokens)
    assert actual.dtype == np.float32
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", ["mistral", "smollm2"])  # untied and tied
def test_streamed_blocks_equal_decoder(name):
    config = CONFIGS[name]
    params = random_params(config, seed=2)
    tokens = random_tokens(config, seed=2)
    outer = {key: value for key, value in params.items() if not key.startswith("layers_")}
    x = llama.embed(config, outer, tokens)
    for i in range(config.num_hidden_layers):
        x = llama.block_forward(config, params[f"layers_{i}"], x)
    logits = llama.head_logits(config, outer, x)
    np.testing.assert_allclose(logits, run(config, params, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_init_makes_the_documented_tree(name):
    config = CONFIGS[name]
    tokens = jnp.zeros((1, 3), int)
    shapes = jax.eval_shape(llama.Decoder(config).init, jax.random.key(0), tokens)["params"]
    expected = jax.tree.map(np.shape, random_params(config, seed=0))
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == expected


def test_token_outside_the_vocabulary_is_nan():
    outer = random_params(CONFIGS["llama2"], seed=0)
    x = llama.embed(CONFIGS["llama2"], outer, jnp.array([[0, CONFIGS["llama2"].vocab_size]]))
    assert np.isfinite(x[0, 0]).all() and np.isnan(x[0, 1]).all()


# --- attention ---


def test_sliding_window_changes_logits_exactly_from_its_length_on():
    config = CONFIGS["mistral"]
    params, tokens = random_params(config, seed=5), random_tokens(config, seed=5)
    unlimited = dataclasses.replace(config, sliding_window=None)
    difference = np.abs(run(config, params, tokens) - run(unlimited, params, tokens)).max(-1)[0]
    assert difference[: config.sliding_window].max() < 1e-4
    assert difference[config.sliding_window :].min() > 1e-3


@pytest.mark.parametrize("window", [None, 1, 5])
def test_a_position_reaches_itself_and_the_rest_of_its_window(window):
    config = dataclasses.replace(CONFIGS["mistral"], sliding_window=window)
    block = random_params(config, seed=6)["layers_0"]
    x, source = activations(config, time=20), 7
    change = llama.block_forward(config, block, x.at[:, source].add(1.0))
    change = np.abs(change - llama.block_forward(config, block, x)).max((0, 2))
    reached = np.flatnonzero(change > 1e-4)
    last = 20 if window is None else source + window
    np.testing.assert_array_equal(reached, np.arange(source, last))


@pytest.mark.parametrize(
    "window, chunk_size", [(None, 4), (1, 4), (3, 4), (6, 4), (30, 5), (3, 64)]
)
def test_chunked_attention_matches_a_masked_softmax(window, chunk_size):
    time, heads, kv_heads, head_dim = 11, 4, 2, 8
    rng = np.random.RandomState(0)
    q, k, v = (
        rng.standard_normal((2, time, n, head_dim)).astype(np.float32)
        for n in (heads, kv_heads, kv_heads)
    )
    k_all, v_all = (np.repeat(array, heads // kv_heads, axis=2) for array in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k_all) / np.sqrt(head_dim)
    age = np.arange(time)[:, None] - np.arange(time)
    weights = np.exp(scores) * ((age >= 0) & (age < (window or time)))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, v_all)
    attention = jax.jit(causal_attention, static_argnums=(3, 4))
    np.testing.assert_allclose(attention(q, k, v, window, chunk_size), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("window", [None, 1, 40, 200])
@pytest.mark.parametrize("time, chunk_size", [(37, 128), (150, 64)])
def test_attention_is_that_of_jax(heads, kv_heads, window, time, chunk_size):
    rng = np.random.RandomState(heads)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, time, n, 16)), jnp.float32)
        for n in (heads, kv_heads, kv_heads)
    )
    reach = None if window is None else (window - 1, 0)
    with jax.default_matmul_precision("highest"):
        expected = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=reach, implementation="xla"
        )
    mixed = causal_attention(q, k, v, window, chunk_size)
    assert mixed.dtype == jnp.float32
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "turns, ratio",
    # Turns within the original context; 2.5 is half way between the two factors 1 and 4.
    [(0.5, 1 / 8), (1.0, 1 / 8), (2.5, 0.5 / 8 + 0.5), (4.0, 1.0), (9.0, 1.0)],
)
def test_llama3_scaling_by_hand(turns, ratio):
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    plain = dataclasses.replace(
        CONFIGS["llama2"], head_dim=4, rope_theta=(8192 / (2 * np.pi * turns)) ** 2
    )
    scaled = dataclasses.replace(plain, rope_scaling=scaling)
    first, second = inverse_frequencies(scaled) / inverse_frequencies(plain)
    assert inverse_frequencies(scaled).dtype == np.float32
    assert first == 1
    assert second == pytest.approx(ratio, rel=1e-5)


# --- one block ---


def numpy_block(config, block, x):
    """A float64 block for one sequence x (time, hidden): loops over heads and positions."""
    block = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), block)
    inputs = {}

    def rms_norm(x, name):
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * block[name]["scale"]
        )

    def linear(x, name):
        inputs[name] = x
        return x @ llama.get_layer(block, name)["kernel"]

    def turn(vector, position):
        half = config.head_dim // 2
        angle = position * config.rope_theta ** (-np.arange(half) / half)
        z = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag])

    normed = rms_norm(x, "input_layernorm")
    q, k, v = (
        linear(normed, f"self_attn/{n}_proj").reshape(len(x), -1, config.head_dim) for n in "qkv"
    )
    mixed = np.zeros_like(q)
    group = config.num_attention_heads // config.num_key_value_heads
    for t in range(len(x)):
        for h in range(config.num_attention_heads):
            query = turn(q[t, h], t)
            scores = np.array([query @ turn(k[s, h // group], s) for s in range(t + 1)])
            weights = np.exp(scores / np.sqrt(config.head_dim))
            mixed[t, h] = weights / weights.sum() @ v[: t + 1, h // group]
    x = x + linear(mixed.reshape(len(x), -1), "self_attn/o_proj")
    normed = rms_norm(x, "post_attention_layernorm")
    gate, up = linear(normed, "mlp/gate_proj"), linear(normed, "mlp/up_proj")
    return x + linear(gate / (1 + np.exp(-gate)) * up, "mlp/down_proj"), inputs


def test_block_and_the_inputs_of_its_layers_match_numpy():
    config = CONFIGS["smollm2"]
    block = random_params(config, seed=7)["layers_0"]
    x = activations(config, time=9)
    y, inputs = llama.block_forward_with_inputs(config, block, x)
    expected_y, expected_inputs = numpy_block(config, block, np.asarray(x[1], np.float64))
    np.testing.assert_allclose(y[1], expected_y, rtol=0, atol=1e-4)
    np.testing.assert_allclose(y, llama.block_forward(config, block, x), rtol=0, atol=1e-5)
    assert set(inputs) == {group[0] for group in stages.LINEAR_GROUPS}
    assert tuple(expected_inputs) == stages.LINEAR_LAYERS
    for group in stages.LINEAR_GROUPS:
        for name in group:
            np.testing.assert_allclose(
                inputs[group[0]][1], expected_inputs[name], rtol=0, atol=1e-4, err_msg=name
            )


def test_bfloat16_activations_stay_bfloat16_and_logits_are_float32():
    config = CONFIGS["llama3"]
    params = random_params(config, seed=8)
    x = activations(config, time=40)
    exact = np.asarray(llama.block_forward(config, params["layers_0"], x))
    x = jnp.asarray(x, jnp.bfloat16)
    y, inputs = llama.block_forward_with_inputs(config, params["layers_0"], x)
    assert {y.dtype, *(value.dtype for value in inputs.values())} == {jnp.dtype(jnp.bfloat16)}
    assert np.linalg.norm(np.asarray(y, np.float32) - exact) < 0.02 * np.linalg.norm(exact)
    for name in ("llama3", "smollm2"):
        logits = llama.head_logits(CONFIGS[name], random_params(CONFIGS[name], seed=8), x)
        logits = np.asarray(logits)
        assert logits.dtype == np.float32
        # Rounded to bfloat16, every logit would be its own bfloat16 image.
        assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TwoHalves:
    """Stands for a packed kernel: a pytree that is no array and multiplies from the right."""

    top: jax.Array
    bottom: jax.Array

    def __rmatmul__(self, x):
        return x @ jnp.concatenate([self.top, self.bottom])


def test_packed_leaves_can_replace_every_kernel():
    config = CONFIGS["llama2"]
    block = random_params(config, seed=9)["layers_0"]
    before = jax.tree.map(np.copy, block)
    dense = packed = block
    for name in stages.LINEAR_LAYERS:
        kernel = llama.get_layer(block, name)["kernel"] * 2
        halves = TwoHalves(*(jnp.asarray(part) for part in np.split(kernel, 2)))
        dense = llama.with_layer(dense, name, kernel)
        packed = llama.with_layer(packed, name, halves)
        assert llama.get_layer(dense, name)["kernel"] is kernel
        assert llama.get_layer(packed, name)["kernel"] is halves
    jax.tree.map(np.testing.assert_array_equal, block, before)  # with_layer changed no input
    x = activations(config, time=5)
    expected = llama.block_forward(config, dense, x)
    np.testing.assert_allclose(llama.block_forward(config, packed, x), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - llama.block_forward(config, block, x)).max() > 1e-2


def test_a_kernel_of_another_shape_raises():
    config = CONFIGS["llama2"]
    block = random_params(config, seed=0)["layers_0"]
    block = llama.with_layer(block, "mlp/up_proj", block["mlp"]["down_proj"]["kernel"])
    with pytest.raises(ValueError, match=r"up_proj has shape \(80, 48\).* must be \(48, 80\)"):
        llama.block_forward(config, block, activations(config, time=3))


def test_unknown_layer_names_raise():
    block = random_params(CONFIGS["llama2"], seed=0)["layers_0"]
    for name in ("mlp", "mlp/q_proj", "self_attn.q_proj"):
        with pytest.raises(ValueError, match="not a linear layer"):
            llama.get_layer(block, name)
        with pytest.raises(ValueError, match="not a linear layer"):
            llama.with_layer(block, name, None)


# --- config.json ---


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_config_round_trip_through_json(name):
    config = CONFIGS[name]
    again = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert again == config
    assert hash(again) == hash(config)


def test_both_forms_of_rope_fields_read_alike():
    base = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    version4 = {**base, "rope_theta": 500000, "rope_scaling": LLAMA3_SCALING}
    version5 = {**base, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500000.0}}
    config = ModelConfig.from_hf(version4)
    assert config == ModelConfig.from_hf(version5)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    assert config.head_dim == 128
    plain = ModelConfig.from_hf({**base, "rope_scaling": None})
    assert (plain.rope_theta, plain.rope_scaling) == (10000.0, None)


BOTH_ROPES = {
    "rope_scaling wins": ({"rope_type": "default"}, LLAMA3_SCALING, None),
    "rope_scaling says default": ({**LLAMA3_SCALING, "rope_theta": 5e5}, {"type": "default"}, None),
    "an empty one does not": ({**LLAMA3_SCALING, "rope_theta": 5e5}, {}, None),
    "null does not": ({"rope_type": "default", "rope_theta": 5e5}, None, None),
    "theta of the one that loses": ({"rope_theta": 5e5}, LLAMA3_SCALING, None),
    "theta of both": ({"rope_theta": 5e5}, {**LLAMA3_SCALING, "rope_theta": 7e5}, 9e5),
    "theta of the top level": ({"rope_type": "default"}, LLAMA3_SCALING, 9e5),
    "type beside rope_type": (None, {**LLAMA3_SCALING, "type": "yarn"}, None),
    "old name of the type": (None, {"type": "default", "factor": 4.0}, None),
    "no original length": (
        None,
        {key: value for key, value in LLAMA3_SCALING.items() if "original" not in key},
        None,
    ),
}


@pytest.mark.parametrize("case", BOTH_ROPES)
def test_rope_fields_are_merged_as_transformers_does(case):
    """Against transformers' own reading, which needs no torch."""
    parameters, scaling, theta = BOTH_ROPES[case]
    hf = CONFIGS["llama2"].to_hf()
    del hf["rope_theta"], hf["rope_scaling"]
    hf |= {"rope_parameters": parameters, "rope_scaling": scaling}
    hf |= {} if theta is None else {"rope_theta": theta}
    ours = ModelConfig.from_hf(hf)
    given = {name: dict(value) if isinstance(value, dict) else value for name, value in hf.items()}
    theirs = LlamaConfig(**given).rope_parameters
    assert ours.rope_theta == theirs["rope_theta"]
    assert (ours.rope_scaling is None) == (theirs["rope_type"] == "default")
    if ours.rope_scaling is not None:
        for name, value in dataclasses.asdict(ours.rope_scaling).items():
            assert value == theirs[name], name


def test_what_the_winning_rope_field_says_is_refused_by_name():
    base = CONFIGS["llama2"].to_hf()
    for kind in ("longrope", "su", "proportional"):
        hf = {**base, "rope_parameters": LLAMA3_SCALING, "rope_scaling": {"type": kind}}
        with pytest.raises(NotImplementedError, match=f"rope_scaling.rope_type='{kind}'"):
            ModelConfig.from_hf(hf)
    nested = {"full_attention": {"rope_type": "default"}}
    with pytest.raises(NotImplementedError, match="rope_parameters .* for 'full_attention'"):
        ModelConfig.from_hf({**base, "rope_scaling": None, "rope_parameters": nested})


def test_a_linear_stretch_by_one_is_none():
    hf = CONFIGS["llama2"].to_hf()
    for factor in (1, 1.0):
        scaling = {"type": "linear", "factor": factor}
        assert ModelConfig.from_hf(hf | {"rope_scaling": scaling}) == ModelConfig.from_hf(hf)
    for factor in (True, None, "1", 0):
        with pytest.raises(ValueError, match="rope_type 'linear': .*factor"):
            ModelConfig.from_hf(hf | {"rope_scaling": {"type": "linear", "factor": factor}})


def test_the_original_length_at_top_level_counts_more():
    hf = {**CONFIGS["llama2"].to_hf(), "rope_scaling": LLAMA3_SCALING}
    hf["original_max_position_embeddings"] = 77
    assert ModelConfig.from_hf(hf).rope_scaling.original_max_position_embeddings == 77


def test_absent_fields_mean_the_defaults_of_transformers():
    base = {key: value for key, value in CONFIGS["mistral"].to_hf().items() if "window" not in key}
    assert ModelConfig.from_hf(base).sliding_window == 4096
    assert ModelConfig.from_hf({**base, "sliding_window": None}).sliding_window is None
    bare = {
        key: value for key, value in CONFIGS["llama2"].to_hf().items() if "key_value" not in key
    }
    assert ModelConfig.from_hf(bare).num_key_value_heads == 4


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"model_type": "gemma"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"is_causal": False}, "is_causal"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.*'su' is not implemented"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.*longrope"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_unsupported_config_fields_raise(changes, field):
    hf = CONFIGS["llama2"].to_hf()
    ModelConfig.from_hf(hf)
    with pytest.raises(NotImplementedError, match=field):
        ModelConfig.from_hf({**hf, **changes})


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"head_dim": None, "hidden_size": 50}, "hidden_size"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3_SCALING, "factor": 0.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type 'dynamic': .*factor"),
        ({"rope_scaling": {"rope_type": "yarn", "beta_fast": "x"}}, "rope_type 'yarn': beta_fast"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_theta": 1}, "rope_theta=1 is too small"),
    ],
)
def test_malformed_config_fields_raise(changes, field):
    with pytest.raises(ValueError, match=field):
        ModelConfig.from_hf({**CONFIGS["llama2"].to_hf(), **changes})
