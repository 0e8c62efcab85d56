"""Error curves from a few measured candidates, on a sample of rows."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from first_passes import find
from tiny_run import config_file

from gptvq_jax.config import AllocationSettings, CalibrationSettings, RunSettings
from gptvq_jax.core import knapsack
from gptvq_jax.methods import gptvq_settings
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.run import curves, gradients
from gptvq_jax.run.curves import interpolate, num_windows, sample_rows, to_measure

TOKENS = np.random.default_rng(0).integers(0, 256, (6, 32)).astype(np.int32)
BITS = (0.5, 1.0, 1.5, 2.0, 2.5)
BLOCKS = 2


# --- the parts ---


def test_a_curve_is_a_parabola_in_the_logarithm_of_the_loss():
    def loss(bits):
        return np.exp(3 - 1.2 * bits + 0.15 * bits**2)

    points = (1.5, 2.5, 4.0)
    for bits in (1.0, *points, 2.0, 3.7):
        found = interpolate(points, [loss(own) for own in points], bits)
        assert found == pytest.approx(loss(bits), rel=1e-12)


@pytest.mark.parametrize("points", [(2.0,), (1.0, 4.0), (1.0, 2.5, 3.0)])
def test_a_curve_goes_through_what_was_measured(points):
    losses = np.random.default_rng(0).lognormal(0, 5, len(points))
    found = [interpolate(points, losses, bits) for bits in points]
    np.testing.assert_allclose(found, losses, rtol=1e-12)


def test_two_points_are_a_line_and_one_a_constant():
    assert interpolate((1.0, 3.0), (8.0, 2.0), 2.0) == pytest.approx(4.0)
    assert interpolate((2.0,), (5.0,), 3.0) == pytest.approx(5.0)


def test_a_loss_of_nothing_has_a_curve_too():
    """A layer of zeros, or one that a candidate holds exactly."""
    assert interpolate((1.0, 2.0, 3.0), (0.0, 0.0, 0.0), 1.5) < 1e-300
    assert 0 <= interpolate((1.0, 2.0, 3.0), (1.0, 1e-3, 0.0), 2.5) < 1e-3


def candidates(dim, *bits):
    return [GPTVQSettings(dim=dim, bits=b) for b in bits]


@pytest.mark.parametrize(
    "count, expected",
    [
        (0, (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)),
        (2, (1.5, 4.0)),
        (3, (1.5, 2.5, 4.0)),
        (6, (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)),
        (7, (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)),
    ],
)
def test_the_ends_are_measured_and_what_lies_evenly_between(count, expected):
    given = candidates(2, 3.0, 1.5, 4.0, 2.0, 3.5, 2.5)  # in any order
    assert tuple(c.bits for c in to_measure(given, count)) == expected


def test_every_dimension_has_measured_candidates_of_its_own():
    given = candidates(1, 2.0, 3.0) + candidates(2, 1.5, 2.0, 2.5, 3.0, 3.5)
    assert to_measure(given, 3) == candidates(1, 2.0, 3.0) + candidates(2, 1.5, 2.5, 3.5)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_are_taken_evenly_from_every_row_group(groups):
    settings = GPTVQSettings(dim=2, bits=1.0, group_size=256, max_group_cols=16)
    rows, cols = 768, 16
    weight = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, cols))
    part, grid = sample_rows(weight, groups, settings)
    parts = settings.parts(rows // groups, cols)
    assert grid == parts[0] and part.shape == (groups * grid.rows, cols)
    assert len(parts[1]) > 1 and grid.rows < rows // groups
    for k, numbers in enumerate(np.split(np.asarray(part[:, 0]), groups)):
        first, last = k * rows // groups, (k + 1) * rows // groups - 1
        assert (numbers[0], numbers[-1]) == (first, last)
        steps = np.diff(numbers)
        assert steps.min() >= 1 and steps.max() - steps.min() <= 1


def test_rows_that_share_a_codebook_are_all_taken():
    settings = GPTVQSettings(dim=2, bits=1.0, group_size=4096)
    weight = jnp.arange(64.0 * 16).reshape(64, 16)
    part, grid = sample_rows(weight, 1, settings)
    np.testing.assert_array_equal(part, weight)
    assert grid == settings.grid(64, 16)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((32, 512), 8),  # a quarter
        ((33, 512), 9),
        ((8, 64), 4),  # twice the 128 inputs of the widest layer
        ((8, 60), 5),
        ((3, 64), 3),  # no more than there are
    ],
)
def test_a_sample_has_a_quarter_of_the_windows_or_twice_the_inputs(source, shape, expected):
    assert max(cols for _, cols in layer_shapes(source.config).values()) == 128
    settings = RunSettings()
    assert num_windows(settings, source.config, shape) == expected
    every = dataclasses.replace(settings, allocation=AllocationSettings(sample=False))
    assert num_windows(every, source.config, shape) == shape[0]


# --- the passes ---


@pytest.fixture(scope="module")
def source(model_dir):
    return open_source(str(model_dir))


@pytest.fixture(scope="module")
def measured(source, tmp_path_factory):
    """{(block, layer): rows} with some settings of the allocation."""
    known = {}

    def measure(**changes):
        key = tuple(changes.items())
        if key not in known:
            allocated = AllocationSettings(bits_per_value=2.0, bits=BITS, em_iterations=2)
            settings = RunSettings(
                num_blocks=BLOCKS,
                vq=GPTVQSettings(codebook_overhead=0.5, max_group_cols=16, codebook_update="none"),
                allocation=dataclasses.replace(allocated, **changes),
                calibration=CalibrationSettings(
                    num_windows=6, held_out=0, batch_size=6, asymmetry=0.0
                ),
            )
            path = tmp_path_factory.mktemp("curves")
            find(source, settings, path, TOKENS)
            known[key] = read(path)
        return known[key]

    return measure


def read(path):
    curves = {}
    for file in sorted((path / "curves").iterdir()):
        for row in json.loads(file.read_text()):
            curves.setdefault((file.stem, row["layer"]), []).append(row)
    assert len(curves) % len(LINEAR_LAYERS) == 0
    return curves


def values(curves, field):
    return np.array([[row[field] for row in rows] for rows in curves.values()])


@pytest.mark.parametrize("count, expected", [(0, BITS), (2, (0.5, 2.5)), (3, (0.5, 1.5, 2.5))])
def test_only_the_wanted_candidates_are_measured(measured, count, expected):
    every, some = measured(measured=0), measured(measured=count)
    assert len(some) == BLOCKS * len(LINEAR_LAYERS)
    for layer, rows in some.items():
        assert [row["bits"] for row in rows] == list(BITS)
        assert tuple(row["bits"] for row in rows if row["measured"]) == expected
        own = {row["bits"]: row["loss"] for row in every[layer]}
        points = [own[bits] for bits in expected]
        for row in rows:
            loss = own[row["bits"]]
            if not row["measured"]:
                loss = interpolate(expected, points, row["bits"])
                assert loss != pytest.approx(own[row["bits"]], rel=1e-6)
            assert row["loss"] == pytest.approx(loss, rel=1e-12)
    np.testing.assert_array_equal(values(some, "num_bytes"), values(every, "num_bytes"))


def test_a_sample_of_rows_has_the_curve_of_all(measured, monkeypatch):
    monkeypatch.setattr(gptvq_settings, "_PART_ROWS", 16)  # small parts of small layers
    changes = {"bits": BITS[:2], "measured": 0}
    sampled, whole = measured(**changes), measured(**changes, sample=False)
    ratios = values(sampled, "loss") / values(whole, "loss")
    assert np.mean(ratios != 1) > 0.5
    assert np.exp(np.abs(np.log(ratios)).mean()) < 1.1, ratios


@pytest.mark.slow
def test_curves_see_the_windows_of_the_sample(source, tmp_path, monkeypatch):
    seen = []
    plain = gradients.block_backward

    def backward(*arguments):
        *_, moments = done = plain(*arguments)
        seen.append(float(sum(m.count for m in moments.inputs.values())))
        return done

    monkeypatch.setattr(gradients, "block_backward", backward)
    monkeypatch.setattr(curves, "measure", lambda *_: [])
    tokens = np.random.default_rng(1).integers(0, 256, (18, 32)).astype(np.int32)
    for sample, expected in ((True, [6, 12, 12]), (False, [6, 12, 18])):
        settings = RunSettings(
            num_blocks=1,
            allocation=AllocationSettings(bits_per_value=2.0, sample=sample),
            calibration=CalibrationSettings(
                num_windows=18, held_out=0, batch_size=6, asymmetry=0.0
            ),
        )
        find(source, settings, tmp_path / str(sample), tokens)
        windows = np.divide(seen[-3:], seen[-3] / 6)  # of block 0, the last that the walk visits
        np.testing.assert_allclose(windows, expected, rtol=1e-5)


def test_the_plan_from_three_candidates_is_close_to_that_from_all(measured):
    """By the losses of all; a uniform choice is 1.4 to 2 times the best one."""
    some, every = measured(measured=3), measured(measured=0)
    losses, sizes = values(every, "loss"), values(every, "num_bytes")

    def total(curves, budget):
        chosen = knapsack.choose(values(curves, "loss"), sizes, budget)
        return sum(of_layer[k] for of_layer, k in zip(losses, chosen, strict=True))

    for uniform, offset in itertools.product((1, 2, 3), (0, 1)):
        budget = int(sizes[:, uniform].sum() * (1 + 0.05 * offset))
        best, found = total(every, budget), total(some, budget)
        assert best <= found < 1.005 * best
        assert found < losses[:, uniform].sum()


# --- the command line ---


@pytest.fixture
def command(model_dir, text_files, tmp_path):
    """Runs quantize.py with a budget and some flags."""
    config = config_file(
        tmp_path / "budget.py",
        model_dir,
        text_files,
        "config.num_blocks, config.calibration.num_windows = 1, 4",
        f"config.allocation.bits_per_value, config.allocation.bits = 1.5, {BITS[:3]}",
        "config.vq.codebook_overhead = 0.5",
    )

    def run(*words):
        line = [sys.executable, Path(__file__).parents[2] / "scripts/quantize.py"]
        line += [f"--config={config}", f"--workdir={tmp_path / 'run'}", *words]
        return subprocess.run(line, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_the_command_line_sets_how_curves_are_measured(command, tmp_path):
    done = command("--config.allocation.measured=2", "--config.allocation.sample=False")
    assert done.returncode == 0, done.stderr
    allocated = json.loads((tmp_path / "run/config.json").read_text())["allocation"]
    assert (allocated["measured"], allocated["sample"]) == (2, False)
    for rows in read(tmp_path / "run").values():
        assert [row["measured"] for row in rows] == [True, False, True]


@pytest.mark.parametrize(
    "words, message",
    [
        (["measured=1"], "error: allocation.measured=1 must be 0 (all), 2 or 3"),
        (["sample=2"], "error: --config.allocation.sample must be True or False"),
        (["bits_per_value=0", "measured=2"], "error: --config.allocation.measured has no effect"),
    ],
)
def test_the_command_line_is_refused_by_name(command, tmp_path, words, message):
    done = command(*(f"--config.allocation.{word}" for word in words))
    assert done.returncode != 0 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
