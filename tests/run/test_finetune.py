"""Block tuning: of one block by itself, and in whole runs against a plain computation."""

import contextlib
import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from steps import Steps
from tiny_checkpoint import MODEL, assert_same_tree, random_block

from gptvq_jax.config import TuneSettings, default_config
from gptvq_jax.console.time_table import time_table
from gptvq_jax.methods.trainable import parameters, with_parameters
from gptvq_jax.models.llama import block_forward, embed
from gptvq_jax.models.open import open_source
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.run import job, passes
from gptvq_jax.run.finetune import Pairs, tune_block
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.dequantize import dequantize_tree

NUM_BLOCKS = 3  # of `model_dir`

# --- one block

WINDOWS, HELD_OUT = 9, 3
SETTINGS = TuneSettings(epochs=3, batch_size=2, learning_rate=3e-3, patience=3, tolerance=0.0)


QUANTIZED = {"self_attn": ("q_proj", "o_proj"), "mlp": ("down_proj",)}


@pytest.fixture(scope="module")
def block():
    """Codebooks in int8, of rank 2 and of AQLM, rounded as the methods do; the rest is dense."""
    as_made = jax.jit(lambda tensor: with_parameters(tensor, parameters(tensor)))
    quantized = random_block(0)
    block = dequantize_tree(quantized)
    for module, layers in QUANTIZED.items():
        for layer in layers:
            block[module][layer]["kernel"] = as_made(quantized[module][layer]["kernel"])
    for norm in ("input_layernorm", "post_attention_layernorm"):
        block[norm]["scale"] = block[norm]["scale"].astype(np.float16)
    return block


@pytest.fixture(scope="module")
def pairs(block):
    """Inputs, and the outputs of a block whose weights differ by a tenth."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(WINDOWS, 8, MODEL.hidden_size)).astype(np.float32)
    other = jax.tree.map(lambda w: w * rng.normal(1, 0.1, w.shape), dequantize_tree(block))
    return Pairs(inputs, np.asarray(block_forward(MODEL, other, inputs)))


def tune(block, pairs, seed=0, on_epoch=lambda text: None, held_out=HELD_OUT, **changes):
    return tune_block(
        MODEL,
        block,
        pairs,
        dataclasses.replace(SETTINGS, **changes),
        held_out=held_out,
        dense_dtype="float16",
        order=np.random.default_rng(seed),
        name="layers_7",
        on_epoch=on_epoch,
    )


def error_of(config, block, x, y):
    """The error in float64 of a block given dense."""
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float64)
    difference = np.asarray(block_forward(config, block, x), np.float64) - y
    return np.mean(difference**2) / np.mean((y - x) ** 2)


def held_out(pairs):
    return pairs.inputs[-HELD_OUT:], pairs.outputs[-HELD_OUT:]


def test_a_block_improves_and_errors_are_those_of_what_is_stored(block, pairs):
    tuned, row = tune(block, pairs)
    assert row["tune_error_after"] < 0.9 * row["tune_error_before"]
    assert (row["epochs"], row["diverged"]) == (3, False)
    for field, given in [("before", block), ("after", tuned)]:
        expected = error_of(MODEL, dequantize_tree(given), *held_out(pairs))
        assert row[f"tune_error_{field}"] == pytest.approx(expected, rel=1e-5)
    # Codes, static fields, dtypes and shapes are as they were.
    assert jax.tree.structure(tuned) == jax.tree.structure(block)
    for (path, new), (_, old) in zip(
        jax.tree_util.tree_leaves_with_path(tuned),
        jax.tree_util.tree_leaves_with_path(block),
        strict=True,
    ):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        if ".codes" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(new, old)
    # Every tensor and norm has moved, and nothing else.
    dense = ("k_proj", "v_proj", "gate_proj", "up_proj")
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(dequantize_tree(tuned)),
        jax.tree.leaves(dequantize_tree(block)),
        strict=True,
    ):
        assert np.array_equal(new, old) == any(name in str(path) for name in dense), path


def test_held_out_windows_are_not_tuned_on(block, pairs):
    """Other targets there change the errors but not the steps; others elsewhere change those."""

    def tuned_with(windows):
        outputs = pairs.outputs.copy()
        outputs[windows] += np.float32(0.01) * pairs.inputs[windows]
        tuned, row = tune(block, Pairs(pairs.inputs, outputs), epochs=1)
        assert row["tune_error_after"] < row["tune_error_before"]
        return tuned["input_layernorm"]["scale"].astype(np.float32), row["tune_error_after"]

    nowhere, error = tuned_with(slice(0, 0))
    there, there_error = tuned_with(slice(-HELD_OUT, None))
    elsewhere, _ = tuned_with(slice(0, -HELD_OUT))
    assert there_error != error
    assert np.abs(there - nowhere).max() <= 1e-3 < np.abs(elsewhere - nowhere).max()


@pytest.mark.parametrize(
    "changes, epochs",
    [
        ({"epochs": 1}, 1),
        ({"epochs": 2}, 2),
        ({"patience": 1, "tolerance": 0.9}, 1),  # it improves, but never by so much
        ({"patience": 2, "tolerance": 0.9}, 2),
    ],
)
def test_epochs_and_patience_end_the_tuning(block, pairs, changes, epochs):
    _, row = tune(block, pairs, **changes)
    assert row["epochs"] == epochs
    assert row["tune_error_after"] < row["tune_error_before"]
    assert not row["diverged"]


def test_what_does_not_help_is_undone(block, pairs):
    tuned, row = tune(block, pairs, learning_rate=1.0)
    assert (row["epochs"], row["diverged"]) == (3, False)
    assert row["tune_error_after"] == row["tune_error_before"]
    assert_same_tree(tuned, block)


def test_the_best_epoch_is_kept(block, pairs):
    """With a learning rate that helps in some epochs and not in others."""
    seen = []
    tuned, row = tune(block, pairs, patience=9, learning_rate=0.03, epochs=8, on_epoch=seen.append)
    errors = [float(text.split()[-1]) for text in seen]
    assert row["epochs"] == 8 and errors[-1] > 1.01 * min(errors)
    best = 1 + int(np.argmin(errors))
    assert best > 1 and row["tune_error_after"] == pytest.approx(min(errors), rel=1e-3)
    assert_same_tree(tuned, tune(block, pairs, patience=9, learning_rate=0.03, epochs=best)[0])


def test_order_and_learning_rate_matter_and_nothing_else_is_random(block, pairs):
    first, again = tune(block, pairs), tune(block, pairs)
    assert_same_tree(again[0], first[0])
    assert again[1] == first[1]
    for other in (tune(block, pairs, seed=1), tune(block, pairs, learning_rate=2e-3)):
        assert other[1]["tune_error_after"] != first[1]["tune_error_after"]


class Breaking:
    """Activations that are NaN from the given read on."""

    def __init__(self, array, read):
        self.array, self.left = array, read

    def __len__(self):
        return len(self.array)

    def __getitem__(self, part):
        self.left -= 1
        return self.array[part] * (1.0 if self.left >= 0 else np.nan)


# Targets of the held-out window are read twice before the first step, and then once after the 4
# batches of every epoch.
@pytest.mark.parametrize("good_epochs, reads", [(0, 2 + 1), (1, 2 + 5 + 2), (2, 2 + 10)])
def test_nan_ends_the_tuning_with_the_last_good_state(block, pairs, caplog, good_epochs, reads):
    outputs = Breaking(pairs.outputs, reads)
    tuned, row = tune(block, Pairs(pairs.inputs, outputs), held_out=1)
    assert outputs.left == -2  # the batch after it was read while its step ran, and no other
    assert row["diverged"] and row["epochs"] == good_epochs + 1
    assert f"layers_7: a tuning step in epoch {good_epochs + 1} is not finite" in caplog.text
    if not good_epochs:
        assert_same_tree(tuned, block)
        return
    expected, of_good = tune(block, pairs, held_out=1, epochs=good_epochs)
    assert_same_tree(tuned, expected)
    assert row["tune_error_after"] == of_good["tune_error_after"]


def test_overflow_of_what_is_stored_ends_it_too(block, pairs, caplog):
    tuned, row = tune(block, pairs, learning_rate=1e9)
    assert row["diverged"] and "not finite" in caplog.text
    assert_same_tree(tuned, block)


# --- whole runs


class Run:
    """A finished run of the tiny model, and a way to run it again or elsewhere."""

    def __init__(self, config, path):
        self.config, self.path = config, path
        self.quantize(path)

    def quantize(self, path):
        return job.quantize(self.config, str(path))

    @property
    def checkpoint(self):
        return PackedCheckpoint(self.path / "checkpoint")

    def rows(self, kind):
        rows = [json.loads(r) for r in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def runs(model_dir, text_files, tmp_path_factory):
    """Runs by method, tuned or not, each made once; one with an asymmetric target, one without."""

    @functools.cache
    def of(method, tuned):
        config = default_config()
        config.model, config.method = str(model_dir), method
        config.vq.bits, config.vq.group_size, config.vq.em_iterations = 1.0, 2048, 1
        config.vq.codebook_update, config.vq.polish_rounds = "none", 0
        config.uniform.bits, config.uniform.group_size = 2, 24
        # Stage by stage, the little that scales and norms can do is done already.
        config.true_sequential = method != "gptq"
        config.calibration.datasets, config.evaluation.dataset = text_files[:1], text_files[1]
        config.calibration.num_windows, config.calibration.seqlen = 16, 32
        config.calibration.held_out = 4
        config.calibration.asymmetry = 0.5 if method == "gptq" else 0.0
        config.evaluation.num_windows, config.evaluation.seqlen = 4, 32
        config.tune.block, config.tune.learning_rate, config.tune.epochs = tuned, 1e-2, 3
        return Run(config, tmp_path_factory.mktemp("runs") / method)

    return of


@pytest.mark.parametrize("method", [pytest.param("gptvq", marks=pytest.mark.slow), "gptq"])
def test_every_block_and_the_whole_model_come_closer_to_the_float_model(runs, method):
    """Walks the model again with the blocks that the checkpoints hold."""
    tuned, plain = runs(method, True), runs(method, False)
    assert len(tuned.rows("block")) == NUM_BLOCKS and not plain.rows("block")
    source, packed, other = open_source(tuned.config.model), tuned.checkpoint, plain.checkpoint
    assert packed.manifest["bits_per_value"] == other.manifest["bits_per_value"]
    tokens = np.load(tuned.path / "tokens.npy")
    y = embed(source.config, source.outer(), tokens)
    x, x_plain = (
        embed(packed.config, packed.outer(), tokens),
        embed(other.config, other.outer(), tokens),
    )
    for index, row in enumerate(tuned.rows("block")):
        assert row["tune_error_after"] < 0.98 * row["tune_error_before"]
        assert row["block"] == index and not row["diverged"]
        x, y = (jnp.asarray(a, jnp.bfloat16).astype(jnp.float32) for a in (x, y))
        y = block_forward(source.config, source.block(index), y)
        target = jnp.asarray(y, jnp.bfloat16)
        error = error_of(source.config, packed.block(index), x[-4:], target[-4:])
        assert row["tune_error_after"] == pytest.approx(error, rel=1e-3)
        x = block_forward(source.config, packed.block(index), x)
        x_plain = block_forward(source.config, other.block(index), x_plain)
    distance = float(jnp.mean(jnp.square(x - y)[-4:]))
    assert distance < 0.98 * float(jnp.mean(jnp.square(x_plain - y)[-4:]))


def test_resumes_in_the_middle_of_tuning_with_the_same_bytes(runs, tmp_path, monkeypatch):
    whole = runs("gptvq", True)
    per_block = len(LINEAR_LAYERS) + 3

    def interrupted(limit):
        bar = Steps(limit)
        with monkeypatch.context() as patch:
            patch.setattr(passes, "Progress", lambda *_: contextlib.nullcontext(bar))
            if limit is None:
                whole.quantize(tmp_path)
            else:
                with pytest.raises(KeyboardInterrupt):
                    whole.quantize(tmp_path)
        return bar

    bar = interrupted(per_block + len(LINEAR_LAYERS) + 1)  # after an epoch of block 1
    assert bar.skipped == 0
    left = {path.name for path in (tmp_path / "activations").iterdir()}
    # Those of block 0 are for the case that it is found damaged.
    inputs = {f"0000{block}.{stream}.npy" for block in (0, 1) for stream in ("quantized", "float")}
    assert left == inputs | {"00002.float.npy"}
    bar = interrupted(None)
    assert bar.skipped == per_block
    assert bar.skipped + bar.advanced == NUM_BLOCKS * per_block
    manifest = "checkpoint/manifest.json"  # it holds a SHA-256 of the arrays of every layer
    assert (tmp_path / manifest).read_bytes() == (whole.path / manifest).read_bytes()
    assert not list((tmp_path / "activations").iterdir())

    def timeless(path, kind):
        rows = Run.rows(SimpleNamespace(path=path), kind)
        return [{**row, "seconds": 0} for row in rows]

    for kind in ("layer", "block"):
        assert timeless(tmp_path, kind) == timeless(whole.path, kind)


def test_the_report_shows_what_the_tuning_did(runs, capsys):
    tuned, plain = runs("gptvq", True), runs("gptvq", False)
    summary = plain.quantize(plain.path)
    assert "block tuning" not in capsys.readouterr().out
    tuned.quantize(tuned.path)
    rows = tuned.rows("block")
    ratio = np.mean([row["tune_error_after"] / row["tune_error_before"] for row in rows])
    assert f"block tuning  held-out block error x {ratio:.3f}" in capsys.readouterr().out
    heights = [plt.imread(r.path / "report.png").shape[0] for r in (tuned, plain)]
    assert heights[0] == 2 * heights[1]  # a panel more
    text = time_table([*tuned.rows("layer"), *rows, summary])
    assert text == time_table([*tuned.rows("layer"), summary])
