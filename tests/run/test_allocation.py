"""Allocation of bits: the budget, the measured curves in float64, the plan, killed runs."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from first_passes import find
from kills import counted_visits

from gptvq_jax.config import AllocationSettings, default_config, from_config
from gptvq_jax.models.llama import block_forward_with_inputs, embed, get_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.models.stages import LINEAR_GROUPS, LINEAR_LAYERS
from gptvq_jax.run import allocation, job
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.storage.checkpoint import PackedCheckpoint

READS = {name: group[0] for group in LINEAR_GROUPS for name in group}
BUDGET = 1.45
MEASURED = 2  # blocks


def allocating_config(model_dir, text_files, gradient_groups):
    """Candidates of 1D and 2D; a curve is measured just as the layer is quantized."""
    config = default_config()
    config.model, config.num_blocks = str(model_dir), MEASURED
    config.vq.seed, config.vq.em_iterations = "mahalanobis", 1  # no random seeds
    config.vq.codebook_update, config.vq.polish_rounds = "none", 0
    config.allocation.bits_per_value, config.allocation.em_iterations = BUDGET, 1
    config.allocation.dims, config.allocation.bits = (1, 2), (1.0, 1.5)
    config.calibration.datasets, config.evaluation.dataset = text_files[:1], text_files[1]
    config.calibration.num_windows, config.calibration.seqlen = 6, 32
    config.calibration.held_out = 2
    config.calibration.inputs, config.calibration.asymmetry = "float", 0.0
    config.true_sequential = False
    config.calibration.gradient_groups = gradient_groups
    config.evaluation.num_windows, config.evaluation.seqlen = 4, 32
    return config


@pytest.fixture(scope="module", params=[0, 1])
def finished(request, model_dir, text_files, tmp_path_factory):
    """A run with an allocation: its settings, summary, work directory and rows by layer."""
    config = allocating_config(model_dir, text_files, request.param)
    path = tmp_path_factory.mktemp("run") / "run"
    summary = job.quantize(config, str(path))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    layers = {(row["block"], row["layer"]): row for row in rows if row["kind"] == "layer"}
    return SimpleNamespace(settings=from_config(config), summary=summary, path=path, layers=layers)


def opened(path):
    return WorkDir(path, json.loads((path / "config.json").read_text()))


def curves(path, num_blocks=MEASURED):
    """{(block, layer): rows of its candidates}."""
    found = {}
    with opened(path) as workdir:
        for index in range(num_blocks):
            for row in workdir.load_curves(index):
                found.setdefault((index, row["layer"]), []).append(row)
    return found


def plan(finished, budget, num_blocks=MEASURED):
    """What is chosen with a budget, as indices of candidates."""
    settings = dataclasses.replace(
        finished.settings,
        allocation=dataclasses.replace(finished.settings.allocation, bits_per_value=budget),
    )
    with opened(finished.path) as workdir:
        chosen = allocation.plan(settings, workdir, num_blocks)
    return {layer: settings.candidates.index(vq) for layer, vq in chosen.items()}


def total(measured, chosen, field):
    return sum(rows[chosen[layer]][field] for layer, rows in measured.items())


def test_the_checkpoint_keeps_the_budget(finished):
    manifest = json.loads((finished.path / "checkpoint/manifest.json").read_text())
    assert 1.2 < manifest["bits_per_value"] <= BUDGET
    assert len(manifest["layers"]) == len(finished.layers) == MEASURED * len(LINEAR_LAYERS)
    num_bytes = sum(row["num_bytes"] for row in finished.layers.values())
    num_values = sum(row["num_values"] for row in finished.layers.values())
    assert manifest["bits_per_value"] == pytest.approx(8 * num_bytes / num_values, rel=1e-12)
    assert finished.summary["bits_per_value"] == manifest["bits_per_value"]


def test_more_em_steps_lower_the_curves(finished, tmp_path):
    """Of one candidate: others would be other programs."""
    changes = {"em_iterations": 8, "dims": (2,), "bits": (1.5,)}
    settings = dataclasses.replace(
        finished.settings,
        num_blocks=1,
        allocation=dataclasses.replace(finished.settings.allocation, **changes),
    )
    find(open_source(settings.model), settings, tmp_path, np.load(finished.path / "tokens.npy"))
    before, after = curves(finished.path, 1), curves(tmp_path, 1)
    assert before.keys() == after.keys() and len(after) == len(LINEAR_LAYERS)
    ratios = []
    for layer, (new,) in after.items():
        old = before[layer][-1]
        assert (old["dim"], old["bits"]) == (new["dim"], new["bits"]) == (2, 1.5)
        ratios.append(new["loss"] / old["loss"])
    assert np.exp(np.mean(np.log(ratios))) < 0.97, ratios


def test_layers_get_what_the_plan_says(finished):
    chosen = plan(finished, BUDGET)
    assert set(finished.layers) == set(chosen) == set(itertools.product(range(2), LINEAR_LAYERS))
    measured = curves(finished.path)
    for layer, row in finished.layers.items():
        vq = finished.settings.candidates[chosen[layer]]
        assert (row["dim"], row["index_bits"]) == (vq.dim, vq.index_bits)
        assert row["num_bytes"] == measured[layer][chosen[layer]]["num_bytes"]
    assert len({row["index_bits"] / row["dim"] for row in finished.layers.values()}) > 1


def test_every_pair_of_dim_and_bits_with_a_whole_code_is_measured(finished):
    for rows in curves(finished.path).values():
        assert [(row["dim"], row["bits"]) for row in rows] == [(1, 1.0), (2, 1.0), (2, 1.5)]


def test_only_the_blocks_to_quantize_are_measured(finished):
    assert [p.name for p in sorted((finished.path / "curves").iterdir())] == [
        "00000.json",
        "00001.json",
    ]
    assert not list((finished.path / "activations").glob("*.curves.*"))


def test_losses_of_the_curves_in_float64(finished):
    """The layers in the checkpoint are the chosen candidates, quantized once more."""
    source = open_source(finished.settings.model)
    packed = PackedCheckpoint(finished.path / "checkpoint")
    chosen, measured = plan(finished, BUDGET), curves(finished.path)
    c = finished.settings.calibration
    x = embed(source.config, source.outer(), np.load(finished.path / "tokens.npy")[: c.num_windows])
    for index in range(MEASURED):
        x = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
        dense, quantized = source.block(index), packed.block(index)
        with opened(finished.path) as workdir:
            gradients = workdir.load_token_weights(index)
        x, read = block_forward_with_inputs(source.config, dense, x)
        for name in LINEAR_LAYERS:
            y = np.asarray(read[READS[name]], np.float64)
            y = y.reshape(-1, y.shape[-1])
            squares = gradients[name][: c.num_windows].reshape(-1).astype(np.float64)
            weights = squares**c.gradient_power if c.gradient_groups else np.ones_like(squares)
            hessian = y.T @ (weights[:, None] * y) / weights.sum()
            error = np.asarray(get_layer(dense, name)["kernel"], np.float64)
            error = (error - np.asarray(get_layer(quantized, name)["kernel"], np.float64)).T
            expected = squares.mean() * np.sum(error @ hessian * error)
            row = measured[index, name][chosen[index, name]]
            # A code that two roundings choose otherwise moves a loss by parts of a percent.
            assert row["loss"] == pytest.approx(expected, rel=1e-2), (index, name)


def test_plan_is_the_best_of_all_for_one_block(finished):
    measured = curves(finished.path, 1)
    candidates = range(len(finished.settings.candidates))
    values = sum(rows[0]["num_values"] for rows in measured.values())
    sums = []
    for choice in itertools.product(candidates, repeat=len(measured)):
        chosen = dict(zip(measured, choice, strict=True))
        sums.append([total(measured, chosen, field) for field in ("num_bytes", "loss")])
    sums = np.array(sums)
    for budget in (1.25, 1.4, 1.5, 1.6):
        best = sums[8 * sums[:, 0] <= budget * values, 1].min()
        chosen = plan(finished, budget, 1)
        assert 8 * total(measured, chosen, "num_bytes") <= budget * values
        assert total(measured, chosen, "loss") == pytest.approx(best, rel=1e-12)


def test_more_budget_never_raises_the_estimated_loss(finished):
    measured = curves(finished.path)
    estimated = [
        total(measured, plan(finished, budget), "loss") for budget in np.arange(1.2, 2, 0.05)
    ]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(estimated))
    assert estimated[-1] < 0.8 * estimated[0]
    least = sum(min(row["loss"] for row in rows) for rows in measured.values())
    assert estimated[-1] == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("block", [1, 0])
@pytest.mark.parametrize("place", ["save_curves", "save_token_weights"])
def test_killed_measurement_resumes_to_the_same_curves(
    finished, tmp_path, monkeypatch, place, block
):
    """Before the curves of a block are written, and between them and its weights."""
    source, tokens = open_source(finished.settings.model), np.load(finished.path / "tokens.npy")
    save = getattr(WorkDir, place)

    def killed(workdir, index, content):
        if index == block:
            raise KeyboardInterrupt
        save(workdir, index, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkDir, place, killed)
        find(source, finished.settings, tmp_path, tokens)
    left = {path.name for path in (tmp_path / "curves").glob("*")}
    assert left == {f"{i:05d}.json" for i in range(block + (place == "save_curves"), MEASURED)}
    with counted_visits() as visits:
        find(source, finished.settings, tmp_path, tokens)
    assert dict(visits) == {("Backward", index): 1 for index in range(block + 1)}
    for name in ("00000.json", "00001.json"):
        expected = (finished.path / "curves" / name).read_bytes()
        assert (tmp_path / "curves" / name).read_bytes() == expected
    with counted_visits() as visits:
        find(source, finished.settings, tmp_path, tokens)
    assert not visits
    with WorkDir(tmp_path, {}) as workdir:
        chosen = allocation.plan(finished.settings, workdir, MEASURED)
    assert chosen == {
        layer: finished.settings.candidates[k] for layer, k in plan(finished, BUDGET).items()
    }


def test_a_budget_that_cannot_be_met_is_refused_before_any_work(model_dir, text_files, tmp_path):
    config = allocating_config(model_dir, text_files, 1)
    config.allocation.bits_per_value = 1.05
    message = r"allocation\.bits_per_value=1\.05 cannot be met.* take 1\.\d+ bits per value"
    with pytest.raises(ValueError, match=message):
        job.quantize(config, str(tmp_path / "run"))
    for name in ("checkpoint", "gradients", "curves"):
        assert not (tmp_path / "run" / name).exists()


def test_sizes_are_known_before_anything_is_measured(finished, caplog):
    """What `check_budget` takes from shapes is what the packed tensors take, to the byte."""
    source = open_source(finished.settings.model)
    measured = curves(finished.path, 1)
    smallest = sum(min(row["num_bytes"] for row in rows) for rows in measured.values())
    values = sum(rows[0]["num_values"] for rows in measured.values())

    largest = sum(max(row["num_bytes"] for row in rows) for rows in measured.values())

    def check(num_bytes):
        caplog.clear()
        bits = 8 * num_bytes / values
        allocated = dataclasses.replace(finished.settings.allocation, bits_per_value=bits)
        settings = dataclasses.replace(finished.settings, allocation=allocated)
        allocation.check_budget(source.config, settings)

    check(largest)
    assert not caplog.records
    check(largest + 1)
    assert "not used up: the largest candidates take" in caplog.text
    check(smallest)
    with pytest.raises(ValueError, match=f"take {8 * smallest / values:.4f} bits per value"):
        check(smallest - 1)


def test_candidates_are_pairs_with_whole_codes():
    settings = from_config(default_config())
    allocated = AllocationSettings(dims=(1, 2, 4), bits=(0.5, 1.25, 2.0, 8.0))
    pairs = [
        (vq.dim, vq.bits) for vq in dataclasses.replace(settings, allocation=allocated).candidates
    ]
    assert pairs == [(1, 2.0), (1, 8.0), (2, 0.5), (2, 2.0), (4, 0.5), (4, 1.25), (4, 2.0)]
