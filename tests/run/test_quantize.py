"""The streaming driver against a plain computation, and the effect of its options."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.config import from_config
from gptvq_jax.models.llama import (
    block_forward,
    block_forward_with_inputs,
    embed,
    get_layer,
    with_layer,
)
from gptvq_jax.models.open import open_source
from gptvq_jax.models.stages import LINEAR_GROUPS, LINEAR_LAYERS
from gptvq_jax.run import evaluate_job, job, objectives, packed_block
from gptvq_jax.run.stream_files import StreamFiles
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.dequantize import dequantize_block


@pytest.fixture
def quantize(tiny_config, tmp_path, capsys):
    """Runs the tiny config with overrides; returns the work directory's metrics by layer."""

    def run_with(name, **overrides):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(overrides)
        summary = job.quantize(config, str(tmp_path / name))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        layers = {(r["block"], r["layer"]): r for r in rows if r["kind"] == "layer"}
        return summary, layers, tmp_path / name

    return run_with


def fitted_tokens(path):
    """Calibration windows but for those that are held out."""
    config = json.loads((path / "config.json").read_text())
    return np.load(path / "tokens.npy")[: config["calibration"]["num_windows"]]


def relative_error(weight, quantized, hessian):
    error = weight - quantized
    return np.sum(error @ hessian * error) / np.sum(weight @ hessian * weight)


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_hessians_and_errors_equal_a_plain_computation(quantize, tiny_config, inputs):
    """Walks the model again in NumPy float64 with the blocks that the checkpoint holds."""
    given = {"calibration.inputs": inputs, "true_sequential": False}
    _, layers, path = quantize("run", **given)
    source = open_source(tiny_config.model)
    packed = PackedCheckpoint(path / "checkpoint")
    fitted, x = (
        len(fitted_tokens(path)),
        embed(source.config, source.outer(), np.load(path / "tokens.npy")),
    )
    assert len(x) > fitted
    for index in range(source.config.num_hidden_layers):
        x = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
        dense, quantized = source.block(index), packed.block(index)
        y, read = block_forward_with_inputs(source.config, dense, x)
        for group in LINEAR_GROUPS:
            both = np.asarray(read[group[0]], np.float64)
            windows = {"relative_error": both[:fitted], "held_out_error": both[fitted:]}
            flats = {field: of.reshape(-1, both.shape[-1]) for field, of in windows.items()}
            hessians = {field: flat.T @ flat / len(flat) for field, flat in flats.items()}
            for name in group:
                weight = np.asarray(get_layer(dense, name)["kernel"], np.float64).T
                approximation = np.asarray(get_layer(quantized, name)["kernel"], np.float64).T
                for field, hessian in hessians.items():
                    expected = relative_error(weight, approximation, hessian)
                    assert layers[index, name][field] == pytest.approx(expected, rel=1e-3)
                ratio = -10 * np.log10(layers[index, name]["held_out_error"])
                assert layers[index, name]["held_out_sqnr_db"] == pytest.approx(ratio, rel=1e-5)
        x = y if inputs == "float" else block_forward(source.config, quantized, x)


def test_asymmetric_target_lowers_the_error_that_it_aims_at(quantize, tiny_config):
    """mean |W x - Q y|^2 of every layer of block 1, in float64: x of the float model, y of its own.

    Quantized one layer at a time from the same W, x and y, since block 0 has no error before it.
    """
    errors = {}
    for strength in (0.0, 1.0):
        given = {"calibration.num_windows": 24, "calibration.asymmetry": strength}
        given |= {"num_blocks": 2, "true_sequential": False}
        _, _, path = quantize(f"run{strength}", **given)
        source = open_source(tiny_config.model)
        packed = PackedCheckpoint(path / "checkpoint")
        x = embed(source.config, source.outer(), fitted_tokens(path))
        float_x = block_forward(source.config, source.block(0), x)
        own_x = block_forward(source.config, packed.block(0), x)
        dense, quantized = source.block(1), packed.block(1)
        _, float_read = block_forward_with_inputs(source.config, dense, float_x)
        _, own_read = block_forward_with_inputs(source.config, dense, own_x)
        for group in LINEAR_GROUPS:
            x, y = (np.asarray(read[group[0]], np.float64) for read in (float_read, own_read))
            for name in group:
                w, q = (np.asarray(get_layer(b, name)["kernel"]) for b in (dense, quantized))
                errors[name, strength] = np.mean(np.square(x @ w - y @ q))
    ratios = {name: errors[name, 1.0] / errors[name, 0.0] for name in LINEAR_LAYERS}
    assert max(ratios.values()) < 0.8, ratios  # 0.40 to 0.66 with three seeds of the model


def test_true_sequential_changes_only_what_comes_after_the_first_group(quantize):
    _, plain, _ = quantize("plain", num_blocks=1, true_sequential=False)
    _, sequential, _ = quantize("sequential", num_blocks=1, true_sequential=True)
    errors, others = (
        {name: run[0, name]["relative_error"] for name in LINEAR_LAYERS}
        for run in (plain, sequential)
    )
    for name in LINEAR_GROUPS[0]:  # two programs: a near tie may be broken the other way
        assert others[name] == pytest.approx(errors[name], rel=1e-3)
    for name in LINEAR_GROUPS[3]:
        assert abs(others[name] / errors[name] - 1) > 1e-2


def test_a_feed_forward_that_is_opened_twice_is_the_same_but_for_a_rounding(quantize, monkeypatch):
    """As on an accelerator; the file of what it opens, in bfloat16, is not there."""
    written, pass_on = [], StreamFiles.pass_on

    def noting(self, stream, point, shape, *more):
        written.append(shape[-1])
        return pass_on(self, stream, point, shape, *more)

    monkeypatch.setattr(StreamFiles, "pass_on", noting)
    _, kept, _ = quantize("kept", num_blocks=2, true_sequential=True)
    wide = max(written)
    assert written.count(wide) == 2
    written.clear()
    monkeypatch.setattr(packed_block, "opens_again", lambda: True)
    _, again, _ = quantize("again", num_blocks=2, true_sequential=True)
    assert written and wide not in written
    for (block, name), row in kept.items():
        if block == 0:  # the second block reads what was rounded or not
            same = pytest.approx(row["relative_error"], rel=1e-6)
            assert again[block, name]["relative_error"] == same
    means = [np.mean([row["relative_error"] for row in of.values()]) for of in (kept, again)]
    assert means[1] == pytest.approx(means[0], rel=0.1)


@pytest.mark.parametrize("tuned", [False, True])
def test_stage_by_stage_every_layer_sees_the_quantized_ones_before_it(
    quantize, tiny_config, monkeypatch, tuned
):
    """Its Hessian is that of the whole block run anew, in which they have taken their places.

    Activations between two stages are bfloat16. A tuned block changes again once it is quantized.
    """
    found, hessians = [], objectives.hessians

    def keeping(moments, least, wanted):
        found.append(hessians(moments, least, wanted))
        return found[-1]

    monkeypatch.setattr(objectives, "hessians", keeping)
    blocks, tune_block = [], packed_block.tune_block

    def before_tuning(config, block, *arguments, **options):
        blocks.append(dequantize_block(block))
        return tune_block(config, block, *arguments, **options)

    monkeypatch.setattr(packed_block, "tune_block", before_tuning)
    given = {"num_blocks": 2, "true_sequential": True}
    if tuned:
        given |= {"tune.block": True, "tune.epochs": 1}
    _, _, path = quantize("run", **given)
    source, packed = open_source(tiny_config.model), PackedCheckpoint(path / "checkpoint")
    assert len(found) == 2 * len(LINEAR_GROUPS) and len(blocks) == 2 * tuned
    left, x = iter(found), embed(source.config, source.outer(), fitted_tokens(path))
    for index in range(2):
        x = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
        seen = dense = source.block(index)
        quantized = blocks[index] if tuned else packed.block(index)
        for stage, group in enumerate(LINEAR_GROUPS):
            ((owner, hessian),) = next(left).items()
            assert owner == (group[0], 0)
            errors = []
            for block in (seen, dense):
                _, read = block_forward_with_inputs(source.config, block, x)
                flat = np.asarray(read[group[0]], np.float64).reshape(-1, hessian.shape[0])
                expected = flat.T @ flat / len(flat)
                errors.append(np.linalg.norm(hessian - expected) / np.linalg.norm(expected))
            assert errors[0] < 2e-3 and (stage == 0 or errors[1] > 10 * errors[0])
            for name in group:
                seen = with_layer(seen, name, get_layer(quantized, name)["kernel"])
        x = block_forward(source.config, packed.block(index), x)


def test_stage_by_stage_every_layer_aims_at_the_outputs_of_the_float_model(
    quantize, tiny_config, monkeypatch
):
    """S = mean (W x - W y) y^T in float64: x of the float model, y behind quantized layers.

    What passes from stage to stage is bfloat16; here it is not.
    """
    seen, quantize_layers = {}, packed_block.quantize_layers

    def keeping(problems):
        seen.update({problem.name: problem.objectives for problem in problems})
        return quantize_layers(problems)

    monkeypatch.setattr(packed_block, "quantize_layers", keeping)
    given = {"num_blocks": 2, "true_sequential": True, "calibration.asymmetry": 0.5}
    _, _, path = quantize("run", **given)
    source, packed = open_source(tiny_config.model), PackedCheckpoint(path / "checkpoint")
    config, float_x = source.config, embed(source.config, source.outer(), fitted_tokens(path))
    own_x = float_x
    for index in range(2):
        own_x, float_x = (
            jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in (own_x, float_x)
        )
        mixed = dense = source.block(index)
        float_x, float_read = block_forward_with_inputs(config, dense, float_x)
        for group in LINEAR_GROUPS:
            _, read = block_forward_with_inputs(config, mixed, own_x)
            x, y = (np.asarray(r[group[0]], np.float64) for r in (float_read, read))
            x, y = (rows.reshape(-1, rows.shape[-1]) for rows in (x, y))
            for name in group:
                (objective,) = seen[f"layers_{index}/{name}"]
                w = np.asarray(get_layer(dense, name)["kernel"], np.float64).T
                distance, size = (np.linalg.norm(w @ a.T @ y / len(y)) for a in (x - y, x))
                error = np.linalg.norm(objective.shift - w @ (x - y).T @ y / len(y))
                assert error < 5e-3 * size
                assert distance > 0.3 * size or index == 0 and group == LINEAR_GROUPS[0]
                mixed = with_layer(mixed, name, get_layer(packed.block(index), name)["kernel"])
        own_x = block_forward(config, mixed, own_x)


def test_what_is_held_out_is_told_and_fitted_to_nothing(quantize, capsys):
    """The layers are those of a run on the same windows without any beside them."""
    few = {"num_blocks": 1, "vq.em_iterations": 0}
    summary, layers, path = quantize("run", **few)
    assert "6 x 32 tokens of" in summary["calibration"] and "held out" in capsys.readouterr().out
    (text,) = summary["calibration_protocol"]["texts"]
    assert (text["windows"], text["held_out_windows"]) == (6, 2)
    other = path.with_name("other")  # without any, but on the same windows
    other.mkdir()
    np.save(other / "tokens.npy", fitted_tokens(path))
    _, others, _ = quantize("other", **few, **{"calibration.held_out": 0})
    assert "held_out_error" in layers[0, "mlp/up_proj"]
    assert "held_out" not in " ".join(others[0, "mlp/up_proj"])
    blocks = [PackedCheckpoint(of / "checkpoint").packed_block(0) for of in (path, other)]
    for name in LINEAR_LAYERS:
        codes = [np.asarray(get_layer(block, name)["kernel"].codes) for block in blocks]
        np.testing.assert_array_equal(*codes)
        same = others[0, name]["relative_error"]
        assert layers[0, name]["relative_error"] == same


def test_num_blocks_leaves_the_rest_dense(quantize, tiny_config):
    summary, layers, path = quantize("run", num_blocks=1)
    assert {block for block, _ in layers} == {0}
    assert summary["num_layers"] == len(LINEAR_LAYERS)
    source, packed = open_source(tiny_config.model), PackedCheckpoint(path / "checkpoint")
    for name in LINEAR_LAYERS:
        same = get_layer(packed.block(2), name)["kernel"]
        np.testing.assert_allclose(same, get_layer(source.block(2), name)["kernel"], atol=1e-3)


def test_methods_rank_as_the_field_knows_them(quantize):
    errors = {}
    for method in ("rtn", "gptq", "gptvq"):
        _, layers, _ = quantize(
            method,
            method=method,
            num_blocks=1,
            **{
                "uniform.bits": 2,
                "uniform.group_size": 32,
                "vq.bits": 2.0,
                "vq.group_size": 512,
                "vq.em_iterations": 10,
                "vq.codebook_update": "least_squares",
            },
        )
        errors[method] = sum(row["relative_error"] for row in layers.values())
    assert errors["gptvq"] < errors["gptq"] < errors["rtn"]


def test_bits_per_value_are_those_of_the_stored_arrays(quantize):
    summary, layers, path = quantize("run")
    packed = PackedCheckpoint(path / "checkpoint")
    stored = values = 0
    for index in range(packed.config.num_hidden_layers):
        block = packed.packed_block(index)
        for name in LINEAR_LAYERS:
            tensor = get_layer(block, name)["kernel"]
            stored += tensor.num_bytes
            values += tensor.shape[0] * tensor.shape[1]
            assert layers[index, name]["bits_per_value"] == tensor.bits_per_value
    assert summary["bits_per_value"] == pytest.approx(8 * stored / values, rel=1e-12)
    assert 1.0 < summary["bits_per_value"] < 1.2


def test_int8_embeddings_are_what_the_blocks_are_calibrated_on(quantize, tiny_config, capsys):
    """The first Hessian is that of the rounded table, in float64."""
    given = {"num_blocks": 1, "calibration.inputs": "quantized"}
    dense_summary, dense_layers, _ = quantize("dense", **given)
    assert dense_summary["embedding_bytes"] == 0
    assert "int8 embeddings" not in capsys.readouterr().out
    summary, layers, path = quantize("int8", **given, embeddings="int8")
    source, packed = open_source(tiny_config.model), PackedCheckpoint(path / "checkpoint")
    vocab, hidden = source.config.vocab_size, source.config.hidden_size
    # A byte for every weight, a float16 scale for every row and one right factor of 256 levels.
    expected = vocab * hidden + 2 * vocab + 2 * 256
    assert summary["embedding_bytes"] == packed.manifest["embedding_bytes"] == expected
    assert f"int8 embeddings {expected / 2**20:.1f} MiB" in capsys.readouterr().out
    assert summary["dense_bytes"] < dense_summary["dense_bytes"]
    assert summary["quantized_bytes"] == dense_summary["quantized_bytes"]
    alone = evaluate_job.evaluate(str(path / "checkpoint"), None)
    assert summary["perplexity_quantized"] == pytest.approx(alone, rel=1e-6)
    assert summary["perplexity_quantized"] != dense_summary["perplexity_quantized"]

    block, tokens = source.block(0), fitted_tokens(path)
    x = jnp.asarray(embed(packed.config, packed.outer(), tokens), jnp.bfloat16).astype(jnp.float32)
    _, read = block_forward_with_inputs(source.config, block, x)
    name = "self_attn/q_proj"
    flat = np.asarray(read[name], np.float64).reshape(-1, hidden)
    weight = np.asarray(get_layer(block, name)["kernel"], np.float64).T
    quantized = np.asarray(get_layer(packed.block(0), name)["kernel"], np.float64).T
    error = relative_error(weight, quantized, flat.T @ flat / len(flat))
    assert layers[0, name]["relative_error"] == pytest.approx(error, rel=1e-5)
    assert dense_layers[0, name]["relative_error"] != pytest.approx(error, rel=1e-5)


def test_evaluate_prints_what_quantize_printed(quantize, capsys):
    summary, _, path = quantize("run", num_blocks=1)
    again = evaluate_job.evaluate(str(path / "checkpoint"), None)
    # Beside the float model fewer tokens go through the head at once, which rounds otherwise.
    assert again == pytest.approx(summary["perplexity_quantized"], rel=1e-6)
    assert f"{again:.4f}" in capsys.readouterr().out
    fewer = evaluate_job.evaluate(str(path / "checkpoint"), None, num_windows=1)
    assert fewer != again


def test_rerun_of_a_finished_run_changes_nothing(quantize, capsys):
    first, _, path = quantize("run")
    assert "finished run" not in capsys.readouterr().out
    manifest = (path / "checkpoint/manifest.json").read_bytes()
    second, layers, _ = quantize("run")
    said = f"{path} holds the finished run of this config; nothing is left to do\n"
    assert capsys.readouterr().out.startswith(said)
    assert (path / "checkpoint/manifest.json").read_bytes() == manifest
    assert second["perplexity_quantized"] == first["perplexity_quantized"]
    assert len(layers) == first["num_layers"]


def test_resumes_among_the_blocks_that_stay_dense(quantize):
    path = quantize("run", num_blocks=1)[2] / "checkpoint"
    manifest = (path / "manifest.json").read_bytes()
    (path / "manifest.json").unlink()
    (path / "blocks/00002/record.json").unlink()
    quantize("run", num_blocks=1)
    assert (path / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("evaluation.seqlen", 4096, r"evaluation\.seqlen=4096 is beyond the 2048 positions"),
        ("calibration.datasets", ("nothing.txt",), "nothing.txt"),
        ("model", "/no/such/model", "/no/such/model"),
    ],
)
def test_bad_input_is_named(quantize, field, value, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        quantize("run", **{field: value})


def test_short_text_is_named(quantize, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    with pytest.raises(ValueError, match="16 tokens"):
        quantize("run", **{"calibration.datasets": (str(short),)})


def test_damping_is_raised_where_the_hessian_is_singular(quantize, caplog):
    """32 tokens cannot excite the 128 inputs of down_proj."""
    _, layers, _ = quantize("run", num_blocks=1, damping=0.0, **{"calibration.num_windows": 1})
    assert layers[0, "mlp/down_proj"]["damping"] > 0
    assert "layers_0/mlp/down_proj: the Hessian is not positive definite" in caplog.text


def test_the_method_gets_its_own_section(tiny_config):
    tiny_config.method = "gptq"
    assert from_config(tiny_config).method_settings == from_config(tiny_config).uniform
