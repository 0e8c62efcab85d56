"""Every family against PyTorch models of transformers, live and stored, and its own parts."""

import dataclasses
import fnmatch
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import FAMILY_POSITIONS, FAMILY_TOKENS, GOLDEN_DIR
from safetensors.numpy import load_file, save_file
from test_config_fuzz import EXACT, OTHER
from tiny_families import CONFIGS, hf_config, random_tokens, torch_logits, write_model

from gptvq_jax.models import flops, llama
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.families import FAMILIES
from gptvq_jax.models.kv_cache import LayerCache
from gptvq_jax.models.open import open_source
from gptvq_jax.models.rope import inverse_frequencies
from gptvq_jax.models.shapes import block_shapes
from gptvq_jax.run.forward import block_halves

REPOSITORY = Path(__file__).parents[2]
FILES = REPOSITORY / "gptvq_jax/models/families"
CHOICES = (
    "rope_scaling",
    "sliding_window",
    "hidden_act",
    "rotary_dim",
    "embedding_scale",
    "attention_scale",
    "residual_scale",
    "logit_divisor",
    "attention_softcap",
    "logit_softcap",
    "normalize_experts",
)
TOKENS = random_tokens(FAMILY_TOKENS)
OF_FAMILIES = [name for name in CONFIGS if name in FAMILIES]
FAST = ("granite", "olmo2", "gemma3_text")  # between them, all that differs
some_in_the_default_suite = pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in OF_FAMILIES],
)


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


@some_in_the_default_suite
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


@some_in_the_default_suite
def test_outputs_of_closing_layers_are_found_from_x(name, tmp_path):
    source = open_source(str(write_model(tmp_path, name)))
    config, block = source.config.of_block(0), source.block(0)
    if config.experts:
        pytest.skip("what its experts add is of several layers")
    x = jnp.asarray(np.random.RandomState(0).standard_normal((1, 9, 48)), jnp.float32)
    y, reads = llama.block_forward_with_inputs(config, block, x)
    middle, _ = block_halves(config, block, x)
    closing_outputs = jax.jit(llama.closing_outputs, static_argnums=(0, 2))
    for stage, layer, before, after in (
        (1, "self_attn/o_proj", x, middle),
        (3, "mlp/down_proj", middle, y),
    ):
        outputs = closing_outputs(config, block, stage, before, after, block)
        expected = reads[layer] @ llama.get_layer(block, layer)["kernel"]
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_choice_of_a_config_changes_the_logits(name, tmp_path):
    """Or the tests above would say nothing of it."""
    source = open_source(str(write_model(tmp_path, name)))
    config, params = source.config, whole(source)
    plain = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    choices = {field: plain[field] for field in CHOICES if getattr(config, field) != plain[field]}
    others = [dataclasses.replace(config, **{field: v}) for field, v in choices.items()]
    layers = {kind.num_experts for kind in config.kinds}
    if config.blocks is not None and len(layers) == 1:  # and what distinguishes them
        kinds = [(kind,) * config.num_hidden_layers for kind in set(config.kinds)]
        others += [dataclasses.replace(config, blocks=alike) for alike in kinds]
    expected = logits(source)
    for other in others:
        changed = jax.jit(llama.Decoder(other).apply)({"params": params}, TOKENS)
        assert np.abs(changed - expected).max() > 1e-2, other


# --- what is refused ---


def test_an_unknown_model_type_lists_the_families_and_the_document():
    with pytest.raises(NotImplementedError) as error:
        ModelConfig.from_hf({"model_type": "mamba"})
    for word in ("'mamba'", *FAMILIES, "docs/add_a_model.md"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "quantization, words",
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "'fp8'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
    ],
)
def test_a_quantized_source_is_refused_by_the_name_of_its_format(tmp_path, quantization, words):
    write_model(tmp_path, "qwen3")
    hf = hf_config("qwen3", quantization_config=quantization)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(NotImplementedError, match=f"config.json: .*{words}: .* pass the float"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "'longrope' is not implemented, only def"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2}}, "'yarn' is not implemented"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"layer_types": ["full_attention"] * 3}, "'llama', whose models have null there"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "'linear_attention'"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must be a list of 3"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier must be"),
        ("granite", {"logits_scaling": None}, "logits_scaling must be"),
        ("granite", {"sliding_window": 8}, "sliding_window must be null"),
        ("gemma3_text", {"query_pre_attn_scalar": 1.5}, "query_pre_attn_scalar must be"),
        ("gemma3_text", {"final_logit_softcapping": -1}, "final_logit_softcapping must be"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern must be"),
        ("gemma3_text", {"rope_local_base_freq": "x"}, "rope_local_base_freq must be"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "one for 'sliding_attention'"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be a list of 3"),
        ("smollm3", {"no_rope_layers": ["a"] * 3}, "no_rope_layers must be a list of 3"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be an integer from 1"),
        ("mixtral", {"num_local_experts": 10**6}, "num_local_experts must be an integer from 1"),
        (
            "mixtral",
            {"num_experts_per_tok": 5},
            "num_experts_per_tok must be an integer from 1 to 4",
        ),
        ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": None}, "num_experts_per_tok"),
        (
            "qwen3_moe",
            {"num_experts_per_tok": 99},
            "^num_experts_per_tok must be an integer from 1",
        ),
        ("qwen3_moe", {"mlp_only_layers": ["a"]}, "mlp_only_layers must be a list of indices"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size must be"),
        ("phi3", {"partial_rotary_factor": 0.25}, "rotary_dim=3 must be even"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_field(tmp_path, name, changes, words):
    with pytest.raises((ValueError, NotImplementedError), match=words) as error:
        ModelConfig.from_hf(hf_config(name, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_every_field_with_every_kind_of_value(name):
    """A config is read, and can be computed with and written, or one line says what is wrong."""
    hf, refused = hf_config(name, **ModelConfig.from_hf(hf_config(name)).to_hf()), 0
    for field in hf:
        for value in (*EXACT, *OTHER):
            try:
                config = ModelConfig.from_hf({**hf, field: value})
                for kind in set(config.kinds):
                    of_kind = dataclasses.replace(config, blocks=None, **kind._asdict())
                    assert np.isfinite(inverse_frequencies(of_kind)).all()
                assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
            except (ValueError, NotImplementedError) as error:
                assert "\n" not in str(error) and len(str(error)) < 400
                refused += 1
    assert refused > 5 * len(hf)


def test_tensors_left_over_or_missing_and_a_missing_shard_are_named(tmp_path):
    write_model(tmp_path / "a", "qwen3")
    for other, error, words in (
        (
            "llama linear",
            NotImplementedError,
            "model_type does not have, the first is .*k_norm.weight; convert .*, or mend the mod",
        ),
        (
            "olmo2",
            ValueError,
            "lacks .* the first is .*post_feedforward_layernorm.weight; download or conv",
        ),
    ):
        (tmp_path / "a/config.json").write_text(json.dumps(hf_config(other, head_dim=24)))
        with pytest.raises(error, match=words):
            open_source(str(tmp_path / "a"))
    write_model(tmp_path / "b", "phi3", shards=3)
    (tmp_path / "b/model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors; is the downl"):
        open_source(str(tmp_path / "b"))


def test_a_missing_tensor_of_an_expert_is_named(tmp_path):
    write_model(tmp_path, "mixtral", shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    home = tmp_path / index["weight_map"].pop(lost)
    tensors = load_file(home)
    del tensors[lost]
    save_file(tensors, home, metadata={"format": "pt"})
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"lacks 1 tensor.s., the first is {lost}"):
        open_source(str(tmp_path))


def test_blocks_with_and_without_experts_have_their_own_layers(tmp_path):
    config = ModelConfig.from_hf(hf_config("qwen3_moe"))
    assert [config.of_block(i).experts for i in range(3)] == [5, 0, 5]
    assert [len(config.of_block(i).linear_layers) for i in range(3)] == [4 + 15, 7, 4 + 15]
    for ask in (lambda: config.layers, lambda: block_shapes(config)):
        with pytest.raises(ValueError, match="pass config.of_block"):
            ask()
    hf = hf_config("qwen3_moe")  # as transformers 5 writes it
    hf["num_local_experts"] = hf.pop("num_experts")
    assert ModelConfig.from_hf(hf) == config
    steps = ModelConfig.from_hf(
        hf_config("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=None, num_hidden_layers=4)
    )
    assert [kind.num_experts for kind in steps.kinds] == [0, 5, 0, 5]


def test_a_fused_weight_of_another_shape_is_named(tmp_path):
    write_model(tmp_path, "phi3")
    (tmp_path / "config.json").write_text(json.dumps(hf_config("phi3", num_key_value_heads=1)))
    source = open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"qkv_proj.weight has shape \(96, 48\), .* \(72, 48\)"):
        source.block(0)


# --- documents ---


def test_registry_readme_and_configs_agree():
    readme = (REPOSITORY / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (`.*`) \|$", readme, re.M)
    rows = [row for row in rows if "*" in row[2]]
    assert {model_type: models for model_type, models, _ in rows} == {
        name: family.models for name, family in FAMILIES.items()
    }
    stems = [path.stem for path in (REPOSITORY / "configs").glob("*.py")]
    patterns = [pattern for *_, cell in rows for pattern in re.findall("`(.*?)`", cell)]
    for stem in stems:
        assert sum(fnmatch.fnmatch(stem, pattern) for pattern in patterns) == 1, stem
    for pattern in patterns:
        assert fnmatch.filter(stems, pattern), pattern


def test_the_document_shows_a_whole_family():
    text = (REPOSITORY / "docs/add_a_model.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert code == (FILES / "granite.py").read_text()
    assert len(text.splitlines()) < 60
