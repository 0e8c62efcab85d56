"""A tiny run of every family: quantized, packed, evaluated, generated from, exported, read back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpr_flops import count
from safetensors import safe_open
from tiny_families import CONFIGS, random_tensors, random_tokens, torch_logits, write_model
from tiny_run import byte_tokenizer, quick_config

from gptvq_jax.config import CalibrationSettings
from gptvq_jax.exchange.aqlm_source import AQLMSource
from gptvq_jax.exchange.hf_aqlm import hf_aqlm
from gptvq_jax.exchange.hf_dense import hf_dense
from gptvq_jax.models import flops
from gptvq_jax.models.families import FAMILIES
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.models.llama import Decoder, block_forward_with_inputs, get_layer, with_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.run import job
from gptvq_jax.run.calibrate import (
    LAST,
    FloatStates,
    crossed_stages,
    init_moments,
    moment_flops,
    step,
)
from gptvq_jax.run.forward import block_halves
from gptvq_jax.run.held_out import Files, init_sums, run_windows
from gptvq_jax.run.objectives import hessians, shift
from gptvq_jax.serve.generate import generate
from gptvq_jax.serve.params import packed_params
from gptvq_jax.storage.checkpoint import PackedCheckpoint

# In the default suite those that between them have everything that Llama has not.
FAST = ("qwen2", "phi3", "gemma3_text")
PARAMS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in CONFIGS
    if name in FAMILIES
]
TOKENS = random_tokens(24, vocab_size=256)


def names_of(directory):
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        return set(file.keys())


def decode(source, tokens=TOKENS):
    """Logits of the float model that a source stands for."""
    blocks = {f"layers_{i}": source.block(i) for i in range(source.config.num_hidden_layers)}
    run = jax.jit(Decoder(source.config).apply)
    return np.asarray(run({"params": {**source.outer(), **blocks}}, tokens))


@pytest.fixture(scope="module", params=PARAMS)
def finished(request, tmp_path_factory, text_files):
    """The source, the summary of a run over it, and the run's checkpoint."""
    path = tmp_path_factory.mktemp(request.param)
    directory = write_model(path / "model", request.param, vocab_size=256)
    byte_tokenizer().save_pretrained(directory)
    config = quick_config(directory, text_files)
    config.vq.bits = 2.0
    # Gradients, float states and quantized ones: all that a run walks the blocks for.
    config.calibration.gradient_groups, config.calibration.asymmetry = 2, 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
        summary = job.quantize(config, str(path / "run"))
    return open_source(str(directory)), summary, PackedCheckpoint(path / "run/checkpoint")


def nll(source, windows):
    """Mean negative log-likelihood of the next tokens of windows, by the whole decoder."""
    logits = jax.nn.log_softmax(decode(source, windows)[:, :-1], axis=-1)
    return -np.take_along_axis(np.asarray(logits), windows[:, 1:, None], axis=-1).mean()


def test_every_layer_is_packed(finished, tmp_path):
    source, summary, packed = finished
    layers = packed.manifest["layers"]
    depth = source.config.num_hidden_layers
    assert layers.keys() == {
        f"layers_{i}/{name}"
        for i in range(depth)
        for name in source.config.of_block(i).linear_layers
    }
    assert packed.config == source.config
    assert 2 < summary["bits_per_value"] < 4
    if source.config.family.fused:  # other formats have one name for what we have two of
        with pytest.raises(NotImplementedError, match="stores qkv_proj, .* --format=hf-dense"):
            hf_aqlm(packed, tmp_path / "out")
        quantization = {"quantization_config": {"quant_method": "aqlm"}}
        hf = json.dumps(source.config.to_hf() | quantization)
        (tmp_path / "config.json").write_text(hf)
        with pytest.raises(NotImplementedError, match="config.json: .*'phi3'.* fused; quantize"):
            AQLMSource(HFDirectory(tmp_path))
    if source.config.family.experts:
        with pytest.raises(NotImplementedError, match="has experts, .* --format=hf-dense"):
            hf_aqlm(packed, tmp_path / "out")
        quantization = {"quantization_config": {"quant_method": "aqlm"}}
        hf = json.dumps(source.config.to_hf() | quantization)
        (tmp_path / "config.json").write_text(hf)
        with pytest.raises(NotImplementedError, match="config.json: .*has experts; quantize"):
            AQLMSource(HFDirectory(tmp_path))


def test_the_evaluation_is_that_of_the_whole_decoder(finished, text_files):
    source, summary, packed = finished
    text = Path(text_files[1]).read_text()[: 4 * 32]
    windows = np.asarray(packed.tokenizer(text)["input_ids"], np.int32).reshape(4, 32)
    for name, model in (("perplexity_float", source), ("perplexity_quantized", packed)):
        assert summary[name] == pytest.approx(np.exp(nll(model, windows)), rel=1e-3)


def test_generation_from_packed_codes_is_greedy(finished):
    _, _, packed = finished
    prompt = list(map(int, TOKENS[0]))
    made = generate(packed.config, packed_params(packed), [prompt], max_tokens=6).tokens[0]
    logits = decode(packed, np.array([prompt + made], np.int32))[0, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(made)[:, None], axis=-1)[:, 0]
    # Of a near tie either is the likeliest.
    np.testing.assert_allclose(chosen, logits.max(-1), rtol=0, atol=1e-3)


def test_the_dense_export_is_the_model_under_the_names_of_the_source(finished, tmp_path):
    source, _, packed = finished
    hf_dense(packed, tmp_path / "out")
    again = open_source(str(tmp_path / "out"))
    assert again.config == source.config
    assert names_of(tmp_path / "out") == set(random_tensors(source.config))
    np.testing.assert_allclose(decode(again), decode(packed), rtol=0, atol=1e-5)


def test_transformers_loads_the_export_with_equal_logits(finished, tmp_path):
    pytest.importorskip("torch")
    *_, packed = finished
    hf_dense(packed, tmp_path / "out")
    expected = decode(packed)
    np.testing.assert_allclose(torch_logits(tmp_path / "out", TOKENS), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["olmo2", "granite", "gemma2"])
def test_an_asymmetric_target_aims_at_what_the_float_layer_computed(name, tmp_path):
    """Not at what a norm or a multiplier behind it made of that, and without the bias."""
    source = open_source(str(write_model(tmp_path, name)))
    config, float_block, rng = source.config.of_block(0), source.block(0), np.random.default_rng(0)
    block = float_block
    for layer in LINEAR_LAYERS:
        kernel = np.asarray(get_layer(block, layer)["kernel"])
        block = with_layer(block, layer, kernel + 0.02 * rng.standard_normal(kernel.shape))
    block = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), block)
    x, y = rng.standard_normal((2, 4, 16, config.hidden_size)).astype(np.float32)
    states = (y, *map(np.asarray, block_halves(config, float_block, y)))
    files, sums = Files(x, reference=states), init_sums(config, block, range(LAST), None, True)
    assert crossed_stages(config, sums.fitted) == set(range(LAST))
    windows = CalibrationSettings(num_windows=4, held_out=0, batch_size=2)
    sums = run_windows(config, block, files, 0, LAST - 1, sums, windows, float_block=float_block)
    moments = sums.fitted
    found = hessians(moments)
    _, read = block_forward_with_inputs(config, block, x)
    _, float_read = block_forward_with_inputs(config, float_block, y)
    for layer in ("self_attn/o_proj", "mlp/down_proj"):
        own, aimed = (get_layer(b, layer)["kernel"] for b in (block, float_block))
        inputs, outputs = read[layer], float_read[layer] @ aimed
        expected = jnp.einsum("bto,bti->oi", outputs - inputs @ own, inputs) / inputs[..., 0].size
        actual = shift(config, moments, (layer, 0), own.T, found[layer, 0])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_flops_of_an_asymmetric_target_behind_norms(tmp_path):
    """As the traced program has them."""
    source = open_source(str(write_model(tmp_path, "olmo2")))
    config, block = source.config, source.block(0)
    x = jnp.zeros((2, 16, config.hidden_size))
    moments = init_moments(config, block, range(LAST), None, True)
    reference = FloatStates(x, x, x)
    counted = count(
        lambda b, x, m, r, f: step(config, b, x, None, 0, LAST, m, None, r, f),
        block,
        x,
        moments,
        reference,
        block,
    )
    expected = flops.block_forward(config, 2, 16) + moment_flops(config, moments, 32)
    expected += flops.closing_outputs(config, range(LAST), 2, 16)
    assert counted == expected
