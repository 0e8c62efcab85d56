"""Every family against PyTorch models of transformers, live and stored, and its own parts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import FAMILY_POSITIONS, FAMILY_TOKENS, GOLDEN_DIR
from tiny_families import CONFIGS, hf_config, random_tokens, torch_logits, write_model

from gptvq_jax.models import flops, llama
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.families import FAMILIES
from gptvq_jax.models.kv_cache import LayerCache
from gptvq_jax.models.open import open_source

TOKENS = random_tokens(FAMILY_TOKENS)
OF_FAMILIES = [name for name in CONFIGS if name in FAMILIES]


def whole(source):
    """The parameter tree of a model."""
    blocks = {f"layers_{i}": source.block(i) for i in range(source.config.num_hidden_layers)}
    return {**source.outer(), **blocks}


def logits(source, tokens=TOKENS):
    run = jax.jit(llama.Decoder(source.config).apply)
    return np.asarray(run({"params": whole(source)}, tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_transformers(name, tmp_path):
    pytest.importorskip("torch")
    write_model(tmp_path, name)
    expected, actual = torch_logits(tmp_path, TOKENS), logits(open_source(str(tmp_path)))
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_logits(name, tmp_path):
    golden = json.loads((GOLDEN_DIR / "families.json").read_text())[name]
    actual = logits(open_source(str(write_model(tmp_path, name))))[0]
    expected = np.array([golden[str(position)] for position in FAMILY_POSITIONS])
    assert np.std(expected) > 0.5  # a degenerate model would agree with anything
    np.testing.assert_allclose(actual[list(FAMILY_POSITIONS)], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_again(name):
    config = ModelConfig.from_hf(hf_config(name))
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_every_family_has_a_model_here():
    assert {CONFIGS[name]["model_type"] for name in CONFIGS} == set(FAMILIES) == set(OF_FAMILIES)


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_a_cache_gives_the_same_logits(name, tmp_path):
    source = open_source(str(write_model(tmp_path, name)))
    config, params, start, time = source.config, whole(source), 30, 34
    tokens = random_tokens(time, batch=2)
    expected = logits(source, tokens)[:, start - 1 :]
    caches = [LayerCache.zeros(config, 2, time, jnp.float32)] * config.num_hidden_layers
    found = []

    def run(x, positions):
        for i, cache in enumerate(caches):
            block = params[f"layers_{i}"]
            x, caches[i] = llama.block_step(config.of_block(i), block, x, cache, positions)
        found.append(llama.head_logits(config, params, x[:, -1:]))

    run(llama.embed(config, params, tokens[:, :start]), None)
    for at in range(start, time):
        run(llama.embed(config, params, tokens[:, at : at + 1]), jnp.full((2, 1), at))
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_outputs_of_closing_layers_are_found_from_x(name, tmp_path):
    source = open_source(str(write_model(tmp_path, name)))
    config, block = source.config.of_block(0), source.block(0)
    x = jnp.asarray(np.random.RandomState(0).standard_normal((1, 9, 48)), jnp.float32)
    y, reads = llama.block_forward_with_inputs(config, block, x)
    between, _, _ = llama.run_stage(
        config, block, 1, x, llama.run_stage(config, block, 0, x, None)[1]
    )
    for stage, name_, ends in (
        (1, "self_attn/o_proj", (x, between)),
        (3, "mlp/down_proj", (between, y)),
    ):
        outputs = llama.closing_outputs(config, block, stage, *ends, block)
        expected = reads[name_] @ llama.get_layer(block, name_)["kernel"]
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["phi3", "gemma2"])
def test_half_precision_in_shards_is_read_as_it_is(name, dtype, tmp_path):
    plain = open_source(str(write_model(tmp_path / "a", name)))
    source = open_source(str(write_model(tmp_path / "b", name, jnp.dtype(dtype), shards=3)))
    for found, stored in zip(
        jax.tree.leaves(whole(source)), jax.tree.leaves(whole(plain)), strict=True
    ):
        np.testing.assert_array_equal(found, np.asarray(stored).astype(dtype).astype(np.float32))


def test_blocks_of_one_kind_have_one_config():
    config = ModelConfig.from_hf(hf_config("gemma3_text", num_hidden_layers=7))
    kinds = [config.of_block(index) for index in range(7)]
    assert [kind.sliding_window for kind in kinds] == [16, 16, None, 16, 16, None, 16]
    assert len(set(kinds)) == 2 and kinds[0] is kinds[1]
    assert (kinds[0].rope_theta, kinds[2].rope_theta) == (300.0, 5e4)
    assert (kinds[0].rope_scaling, kinds[2].rope_scaling.factor) == (None, 8.0)
    turns = ModelConfig.from_hf(hf_config("smollm3", num_hidden_layers=4)).kinds
    assert [kind.rotary for kind in turns] == [True, False, True, False]
    with pytest.raises(ValueError, match="pass config.of_block"):
        llama.block_forward(config, {}, jnp.zeros((1, 2, 48)))


def test_flops_of_blocks_that_differ():
    config = ModelConfig.from_hf(hf_config("gemma3_text"))
    short, long = (flops.block_forward(config.of_block(i), 2, 300) for i in (0, 2))
    assert short < long
    assert flops.blocks_forward(config, 2, 300) == 2 * short + long
