"""Method 'trellis' in a run: bits of all columns under one budget, and what is made of them."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import config_file

from gptvq_jax.config import RunSettings, default_config, from_config
from gptvq_jax.core.hessian import factorize, unit
from gptvq_jax.core.trellis_tensor import MAX_RATE
from gptvq_jax.methods.trellis import TrellisSettings
from gptvq_jax.methods.trellis_budget import demand
from gptvq_jax.models.llama import block_forward_with_inputs, embed, get_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.models.stages import LINEAR_GROUPS, LINEAR_LAYERS
from gptvq_jax.moves.excess import distortion
from gptvq_jax.moves.rates import price, water_fill
from gptvq_jax.run import columns, job
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.serve.generate import generate
from gptvq_jax.serve.params import dense_params, packed_params
from gptvq_jax.storage.checkpoint import PackedCheckpoint

BUDGET = 3.2


def settings(budget=2.5):
    base = RunSettings()
    return dataclasses.replace(
        base,
        method="trellis",
        allocation=dataclasses.replace(base.allocation, bits_per_value=budget),
    )


def layers(worth=(1.0, 100.0)):
    rng = np.random.default_rng(0)
    rows = {}
    for number, (w, shape) in enumerate(zip(worth, ((64, 48), (256, 32)), strict=True)):
        values = (w * rng.lognormal(0, 1, shape[1])).tolist()
        rows[0, f"layer{number}"] = {"shape": list(shape), "outliers": number, "values": values}
    return rows


def plan_of(settings, rows):
    return columns.plan(settings, {layer: [row] for layer, row in rows.items()})


@pytest.mark.parametrize("budget", [1.8, 2.5, 4.0])
def test_the_plan_spends_the_budget_where_it_lowers_the_loss(budget):
    rows = layers()
    plan = plan_of(settings(budget), rows)
    sizes = {layer: np.prod(row["shape"]) for layer, row in rows.items()}
    spent = sum(plan[layer].bits * size for layer, size in sizes.items()) / sum(sizes.values())
    assert budget - 256 / sum(sizes.values()) <= spent <= budget
    assert plan[0, "layer1"].bits > plan[0, "layer0"].bits
    assert {s.bits for s in plan.values()} != {budget}
    others = {dataclasses.replace(s, bits=2.0) for s in plan.values()}
    assert others == {TrellisSettings(bits=2.0, form="codes")}


def test_a_layer_may_get_all_the_bits_that_there_are():
    rows = layers()
    rows[0, "layer1"]["values"] = [1e30] * 32
    plan = plan_of(settings(5.0), rows)
    assert plan[0, "layer1"].bits == MAX_RATE > plan[0, "layer0"].bits > 0


def test_equal_worth_gets_equal_bits():
    rows = layers()
    rows[0, "layer0"]["values"], rows[0, "layer1"]["values"] = [64.0] * 48, [256.0] * 32
    plan = plan_of(settings(2.5 + 0.5), rows)
    codes = {
        layer: plan[layer].budget_bytes(*row["shape"])
        - plan[layer].fixed_bytes(*row["shape"]) - 4 * row["outliers"]
        for layer, row in rows.items()
    }  # fmt: skip
    rates = {
        layer: codes[layer] / (TrellisSettings().bytes_per_bit(row["shape"][0]) * row["shape"][1])
        for layer, row in rows.items()
    }
    assert abs(rates[0, "layer0"] - rates[0, "layer1"]) < 1


@pytest.mark.parametrize("budget", [1.6, 2.1, 3.1])
def test_a_byte_is_worth_the_same_in_layers_that_are_planned_together(budget):
    """So that a layer, which keeps outliers at its own price, keeps them at that of the model."""
    rng, rows = np.random.default_rng(0), {}
    for number, (w, shape) in enumerate([(1.0, (64, 300)), (7.0, (256, 200)), (0.2, (96, 500))]):
        values = (w * rng.lognormal(0, 1.5, shape[1])).tolist()
        rows[0, f"layer{number}"] = {"shape": list(shape), "outliers": number, "values": values}
    errors, prices = distortion(TrellisSettings().window_bits), []
    for layer, own in plan_of(settings(budget), rows).items():
        shape, values = rows[layer]["shape"], np.array(rows[layer]["values"])
        costs = np.full(shape[1], own.bytes_per_bit(shape[0]))
        left = own.budget_bytes(*shape) - own.fixed_bytes(*shape) - 4 * rows[layer]["outliers"]
        rates = water_fill(values, costs, left, errors)
        prices.append(price(values, costs, rates, errors))
    assert 0 < max(prices) < 1.05 * min(prices)


def test_outliers_beyond_the_budget_are_named():
    rows = layers()
    rows[0, "layer0"]["outliers"] = 3000
    with pytest.raises(ValueError, match="bits_per_value=2.5 is below .* trellis.outlier_limit"):
        plan_of(settings(2.5), rows)


def test_a_layer_of_too_many_outliers_is_named_with_the_bits_it_gets(caplog):
    rows = layers()
    most = dataclasses.replace(TrellisSettings(), bits=2.5).most_outliers(64, 48)
    rows[0, "layer0"]["outliers"] = most - 1
    plan_of(settings(2.5), rows)
    assert not caplog.records
    rows[0, "layer0"]["outliers"] = most
    plan = plan_of(settings(2.5), rows)
    ((_, _, line),) = caplog.record_tuples
    assert f"layers_0/layer0 has more outliers than the {most} that are kept" in line
    assert f"{plan[0, 'layer0'].bits:.3f} bits per value" in line


def test_a_crowded_layer_is_kept_in_8_bits_out_of_the_budget_of_all(caplog):
    rows = layers()
    before = plan_of(settings(4.0), rows)
    rows[0, "layer0"]["crowded"] = True
    plan = plan_of(settings(4.0), rows)
    ((_, _, line),) = caplog.record_tuples
    assert "layers_0/layer0 has more outliers than the 1 % of its weights" in line
    taken = plan[0, "layer0"].budget_bytes(64, 48)
    assert f"in 8 bits, {8 * taken / (64 * 48):.3f} bits per value" in line
    assert plan[0, "layer0"].form == "int8" and plan[0, "layer1"].form == "codes"
    left = 4.0 * (64 * 48 + 256 * 32) / 8 - taken
    assert left - 32 <= plan[0, "layer1"].budget_bytes(256, 32) <= left
    assert plan[0, "layer1"].bits < before[0, "layer1"].bits
    with pytest.raises(ValueError, match="=2 is below .* kept in 8 bits; .*trellis.form=codes"):
        plan_of(settings(2.0), rows)


def test_all_layers_in_8_bits_need_a_budget_of_so_many():
    base = settings(9.3)
    base = dataclasses.replace(base, trellis=dataclasses.replace(base.trellis, form="int8"))
    plan = plan_of(base, layers())
    assert {own.form for own in plan.values()} == {"int8"}


@pytest.fixture(scope="module")
def finished(model_dir, text_files, tmp_path_factory):
    """A run of method 'trellis' under a budget."""
    config = default_config()
    config.model, config.method, config.num_blocks = str(model_dir), "trellis", 2
    config.trellis.window_bits, config.trellis.stream_rows = 6, 16
    config.trellis.recode_passes, config.trellis.block_size = 1, 16
    config.allocation.bits_per_value = BUDGET
    config.calibration.datasets, config.evaluation.dataset = text_files[:1], text_files[1]
    config.calibration.num_windows, config.calibration.seqlen = 6, 32
    config.calibration.held_out = 2
    config.calibration.gradient_groups = 1
    config.evaluation.num_windows, config.evaluation.seqlen = 4, 32
    path = tmp_path_factory.mktemp("run") / "run"
    summary = job.quantize(config, str(path))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return config, summary, path, [row for row in rows if row["kind"] == "layer"]


def test_a_run_meets_its_budget_from_below(finished):
    _, summary, path, rows = finished
    assert [(row["block"], row["layer"]) for row in rows] == [
        (block, name) for block in range(2) for name in LINEAR_LAYERS
    ]
    sizes = np.array([row["num_values"] for row in rows])
    bits = np.array([row["bits_per_value"] for row in rows])
    assert summary["bits_per_value"] == pytest.approx(bits @ sizes / sizes.sum())
    # A layer of 16 x 48 weights cannot spend less than 16 bits at once.
    assert BUDGET - 0.05 < summary["bits_per_value"] <= BUDGET
    assert np.ptp(bits) > 0.1
    packed = PackedCheckpoint(path / "checkpoint")
    for row in rows:
        tensor = get_layer(packed.packed_block(row["block"]), row["layer"])["kernel"]
        assert row["num_bytes"] == tensor.num_bytes
        counts = np.bincount(tensor.column_rates(), minlength=7)
        assert row["columns_by_rate"] == counts.tolist()
        assert row["index_bits"] == 6 and 0 < row["code_entropy"] <= 6
        assert 0 < row["relative_error"] < 0.3


def test_errors_are_those_of_the_fitted_and_of_the_held_out_windows(finished):
    """Of the layers that the first block begins with, token weights included, in float64."""
    config, _, path, rows = finished
    source, packed = open_source(config.model), PackedCheckpoint(path / "checkpoint")
    with WorkDir(path, json.loads((path / "config.json").read_text())) as workdir:
        weights = workdir.load_token_weights(0)
    tokens, fitted = np.load(path / "tokens.npy"), config.calibration.num_windows
    assert len(tokens) == fitted + config.calibration.held_out
    x = jnp.asarray(embed(packed.config, packed.outer(), tokens), jnp.bfloat16).astype(jnp.float32)
    _, read = block_forward_with_inputs(source.config, source.block(0), x)
    own = {row["layer"]: row for row in rows if row["block"] == 0}
    for name in LINEAR_GROUPS[0]:
        y = np.asarray(read[LINEAR_GROUPS[0][0]], np.float64)
        w, q = (
            np.asarray(get_layer(block, name)["kernel"], np.float64).T
            for block in (source.block(0), packed.block(0))
        )
        assert weights[name].shape == (*tokens.shape, 1)
        counts = np.asarray(weights[name], np.float64) ** config.calibration.gradient_power
        for field, part in (
            ("relative_error", slice(fitted)),
            ("held_out_error", slice(fitted, None)),
        ):
            error, signal = (np.square(y[part] @ m.T) * counts[part] for m in (w - q, w))
            assert own[name][field] == pytest.approx(error.sum() / signal.sum(), rel=1e-3)
    errors = np.array([[row["relative_error"], row["held_out_error"]] for row in rows])
    assert np.all(errors > 0) and errors[:, 1].mean() > errors[:, 0].mean()  # little text is fitted


def test_the_worth_of_columns_is_the_rise_of_the_loss(finished):
    """By the definition, in float64: what is lost without a column, the ones behind it corrected.

    That is w^2 over the diagonal of the inverse of the Hessian's part from that column on; in the
    unit of the model's loss, with the mean squared gradient at the outputs.
    """
    config, _, path, _ = finished
    source = open_source(config.model)
    with WorkDir(path, json.loads((path / "config.json").read_text())) as workdir:
        gradients = [workdir.load_token_weights(index) for index in range(2)]
    fitted = config.calibration.num_windows
    x = embed(source.config, source.outer(), np.load(path / "tokens.npy")[:fitted])
    for index in range(2):
        x = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
        dense = source.block(index)
        x, read = block_forward_with_inputs(source.config, dense, x)
        rows = json.loads((path / f"curves/{index:05d}.json").read_text())
        assert [row["layer"] for row in rows] == list(LINEAR_LAYERS)
        for row in rows:
            name = row["layer"]
            group = next(group for group in LINEAR_GROUPS if name in group)
            y = np.asarray(read[group[0]], np.float64)
            y = y.reshape(-1, y.shape[-1])
            squares = gradients[index][name][:fitted].reshape(-1).astype(np.float64)
            weights = np.sqrt(squares)  # calibration.gradient_power
            hessian = y.T @ (weights[:, None] * y) / weights.sum()
            hessian += config.damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
            weight = np.asarray(get_layer(dense, name)["kernel"], np.float64).T
            assert row["shape"] == list(weight.shape) and row["outliers"] == 0
            worth = [
                np.sum(weight[:, j] ** 2) * squares.mean() / np.linalg.inv(hessian[j:, j:])[0, 0]
                for j in range(weight.shape[1])
            ]
            np.testing.assert_allclose(row["values"], worth, rtol=0.02, err_msg=f"{index} {name}")


def test_worth_does_not_depend_on_the_unit_of_the_hessian():
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(24, 10)), jnp.float32)
    x = rng.normal(size=(50, 10))
    hessian = jnp.asarray(x.T @ x, jnp.float32)
    settings = TrellisSettings()

    def worth(h):
        found = demand(weight, factorize(h, 0.0).hinv_chol, settings, most=0)
        return np.asarray(found.values) * float(unit(h))

    np.testing.assert_allclose(worth(hessian * 64), 64 * worth(hessian), rtol=1e-4)
    # The last column has nothing behind it: its loss at 0 bits is what the Hessian says.
    inverse = np.linalg.inv(np.asarray(hessian, np.float64))
    kept = float(np.sum(np.square(weight[:, 0]))) / inverse[0, 0]
    chol = np.linalg.cholesky(inverse).T
    expected = float(np.sum(np.square(weight[:, -1]))) / chol[-1, -1] ** 2
    np.testing.assert_allclose(worth(hessian)[-1], expected, rtol=1e-3)
    np.testing.assert_allclose(worth(hessian)[0], kept, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["reference", "xla", "auto"])
def test_it_generates_packed_what_the_dequantized_model_does(finished, implementation):
    _, _, path, _ = finished
    packed = PackedCheckpoint(path / "checkpoint")
    prompts = [[5, 9, 11], [7, 3, 2, 8]]
    own, dense = (
        generate(packed.config, params, prompts, max_tokens=12).tokens
        for params in (packed_params(packed, implementation), dense_params(packed))
    )
    assert own == dense


def test_gradient_groups_are_refused():
    config = RunSettings()
    calibration = dataclasses.replace(config.calibration, gradient_groups=2)
    with pytest.raises(ValueError, match="gradient_groups=2 must be 0 or 1 with method 'trellis'"):
        dataclasses.replace(config, method="trellis", calibration=calibration)


def test_a_budget_below_scales_is_refused_before_any_work(finished, tmp_path):
    config = finished[0].copy_and_resolve_references()
    config.allocation.bits_per_value = 0.3
    with pytest.raises(ValueError, match="bits_per_value=0.3 cannot be met: scales and rates"):
        job.quantize(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert from_config(config).candidates == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["bits=0.3"],
            "error: self_attn/q_proj: trellis.bits=0.3 is below what the scales and rates of a ",
        ),
        (["outlier_limit=1"], "error: trellis.outlier_limit='1' must be 'auto', 0, or 2 up"),
        (["levels=24"], "error: trellis.levels='24' must be 'gaussian', or a power of two"),
    ],
)
def test_the_command_line_is_refused_before_any_work(
    model_dir, text_files, tmp_path, words, message
):
    config = config_file(tmp_path / "own.py", model_dir, text_files, "config.method = 'trellis'")
    line = [sys.executable, Path(__file__).parents[2] / "scripts/quantize.py"]
    line += [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    line += [f"--config.trellis.{word}" for word in words]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_limits_and_levels_of_the_command_line_reach_the_layers(model_dir, text_files, tmp_path):
    config = config_file(
        tmp_path / "own.py",
        model_dir,
        text_files,
        "config.method, config.num_blocks, config.calibration.num_windows = 'trellis', 1, 4",
        "config.trellis.window_bits, config.trellis.stream_rows = 6, 16",
    )
    line = [sys.executable, Path(__file__).parents[2] / "scripts/quantize.py"]
    line += [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.trellis.bits=5"]
    line += ["--config.trellis.levels=16", "--config.trellis.outlier_limit=2.5"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    block = PackedCheckpoint(tmp_path / "run/checkpoint").packed_block(0)
    tensors = [get_layer(block, name)["kernel"] for name in LINEAR_LAYERS]
    assert all(len(tensor.levels) == 16 for tensor in tensors)
    assert any(tensor.outlier_gaps is not None for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.0, 4.0])
def test_a_run_keeps_a_crowded_layer_in_8_bits(model_dir, text_files, tmp_path, budget, caplog):
    changed = tmp_path / "model"
    shutil.copytree(model_dir, changed)
    path, name = changed / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    wild = np.random.default_rng(0).standard_cauchy(tensors[name].shape) / 30
    save_file({**tensors, name: np.clip(wild, -3, 3).astype(tensors[name].dtype)}, path)
    config = default_config()
    config.model, config.method, config.num_blocks = str(changed), "trellis", 1
    config.trellis.window_bits, config.trellis.stream_rows, config.trellis.bits = 6, 16, 3.5
    config.allocation.bits_per_value = budget
    config.calibration.datasets, config.evaluation.dataset = text_files[:1], text_files[1]
    config.calibration.num_windows, config.calibration.seqlen = 4, 32
    config.calibration.held_out = 2
    config.evaluation.num_windows, config.evaluation.seqlen = 2, 32
    summary = job.quantize(config, str(tmp_path / "run"))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = {row["layer"]: row for row in map(json.loads, lines) if row["kind"] == "layer"}
    kept = rows.pop("mlp/up_proj")
    assert kept["index_bits"] == 8 and "is kept in 8 bits" in kept["note"]
    assert "layers_0/mlp/up_proj" in caplog.text
    assert {row["index_bits"] for row in rows.values()} == {6}
    if budget:  # of all layers together
        assert 3.9 < summary["bits_per_value"] <= budget
    packed = PackedCheckpoint(tmp_path / "run/checkpoint")
    own, dense = (
        generate(packed.config, params, [[5, 9, 11]], max_tokens=8).tokens
        for params in (packed_params(packed), dense_params(packed))
    )
    assert own == dense
