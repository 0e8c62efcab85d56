"""Tuning a packed model as a whole: what it reaches, keeps, goes on from, and refuses."""

import dataclasses
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from documented import parsed
from tiny_run import config_file, quick_config

from gptvq_jax.config import FinetuneSettings, from_config
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.models.open import open_source
from gptvq_jax.run import job, tune_model
from gptvq_jax.run.evaluate import evaluated
from gptvq_jax.run.finetune_job import finetune
from gptvq_jax.run.model_loss import divergence
from gptvq_jax.run.student import Student
from gptvq_jax.study.random_model import write_random_llama

NUM_BLOCKS = 3
_TOOK = ("seconds", "compile_seconds", "stages", "totals", "peak_memory_bytes", "checkpoint_bytes")

# Of a model this small, whose every vector weighs more.
CODES = {"codes": True, "codes_share": 0.02, "codes_rate": 1.0, "codes_trust": 1.0}


def tuning_config(model_dir, text_files):
    config = quick_config(model_dir, text_files)
    f = config.finetune
    f.num_windows, f.held_out, f.epochs, f.batch_size, f.micro_batch = 8, 2, 3, 4, 2
    f.learning_rate = f.scale_learning_rate = f.norm_learning_rate = 1e-2
    f.evaluate_every = 2
    return config


class Tuned:
    """A quantized model, and tunings of it."""

    def __init__(self, config, directory):
        self.config, self.directory = config, directory
        self.checkpoint = directory / "run" / "checkpoint"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
            job.quantize(config, str(directory / "run"))

    def tune(self, name, model=None, given=(), **changes):
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.finetune.update(changes)
        path = self.directory / name
        return path, finetune(str(self.checkpoint), str(path), config, model, given)


@pytest.fixture(scope="module")
def tuned(model_dir, text_files, tmp_path_factory):
    made = Tuned(tuning_config(model_dir, text_files), tmp_path_factory.mktemp("tuned"))
    made.path, made.summary = made.tune("whole")
    return made


def rows(path, *kinds):
    found = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in row.items() if k not in _TOOK} for row in found if row["kind"] in kinds
    ]


def leaves(checkpoint):
    """{path: leaf} of the packed blocks."""
    from gptvq_jax.storage.checkpoint import PackedCheckpoint

    packed = PackedCheckpoint(checkpoint)
    found = {}
    for index in range(NUM_BLOCKS):
        flat = jax.tree_util.tree_flatten_with_path(
            packed.packed_block(index), is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)
        )[0]
        found |= {(index, jax.tree_util.keystr(path)): leaf for path, leaf in flat}
    return packed, found


def test_it_lowers_the_divergence_of_what_is_written(tuned):
    """Measured again from the files of the tuned checkpoint; codes and bits are as they were."""
    row = tuned.summary["tuning"]
    assert row["held_out_after"] < 0.99 * row["held_out_before"]
    packed, after = leaves(tuned.path / "checkpoint")
    before_packed, before = leaves(tuned.checkpoint)
    assert divergence_of(tuned) == pytest.approx(row["held_out_after"], rel=1e-4)
    assert packed.manifest["bits_per_value"] == before_packed.manifest["bits_per_value"]
    assert packed.manifest["source"] == before_packed.manifest["source"]
    for path, leaf in after.items():
        old = before[path]
        if isinstance(leaf, QuantizedTensor):
            np.testing.assert_array_equal(leaf.codes, old.codes)
        same = map(np.array_equal, jax.tree.leaves(leaf), jax.tree.leaves(old))
        assert not all(same), path


def divergence_of(tuned):
    """On the windows held out, of the files of the tuned checkpoint."""
    packed, _ = leaves(tuned.path / "checkpoint")
    source = open_source(tuned.config.model)
    tokens = _windows(tuned)[-2:]
    with (
        evaluated(source, tokens, stopwatch=Stopwatch()) as of_float,
        evaluated(packed, tokens, stopwatch=Stopwatch()) as of_packed,
    ):
        target = np.asarray(of_float.outputs()[:], jax.numpy.bfloat16).astype(np.float32)
        kl, _, _ = divergence(
            packed.config,
            of_packed.head(),
            of_packed.outputs()[:],
            source.config,
            of_float.head(),
            target,
        )
    return float(np.sum(kl)) / tokens.size


def _windows(tuned):
    """Those of the tuning, drawn again."""
    from gptvq_jax.run.text import calibration_tokens

    settings, f = from_config(tuned.config), tuned.config.finetune
    text = dict(num_windows=f.num_windows, held_out=f.held_out, seed=f.seed)
    of_text = dataclasses.replace(settings.calibration, **text)
    source = open_source(tuned.config.model)
    return calibration_tokens(source, dataclasses.replace(settings, calibration=of_text))


def test_rows_say_what_happened(tuned):
    steps = [row for row in rows(tuned.path, "tune") if "loss" in row]
    looks = [row for row in rows(tuned.path, "tune") if "held_out" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in looks] == [0, 2, 4, 6]
    assert min(row["held_out"] for row in looks) == tuned.summary["tuning"]["held_out_after"]
    assert steps[0]["rate"] == 1.0  # 5 % of 6 steps are none
    rates = [row["rate"] for row in steps]
    assert rates == sorted(rates, reverse=True)
    assert all(row["tflop"] > 0 for row in steps)
    moved = rows(tuned.path, "moved")
    assert len({row["leaf"] for row in moved}) == NUM_BLOCKS * 9 + 1
    assert all(0 < row["moved"] < 0.1 for row in moved)
    assert not (tuned.path / "tuning").exists()


def test_as_the_last_stage_of_a_run_it_is_the_same(tuned, tmp_path):
    config = tuned.config.copy_and_resolve_references()
    config.tune.model = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
        summary = job.quantize(config, str(tmp_path))
    assert summary["tuning"] == tuned.summary["tuning"]
    for one, other in zip(
        leaves(tmp_path / "checkpoint")[1].values(),
        leaves(tuned.path / "checkpoint")[1].values(),
        strict=True,
    ):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    untuned = json.loads((tmp_path / "untuned" / "manifest.json").read_text())
    before = json.loads((tuned.checkpoint / "manifest.json").read_text())
    assert untuned["layers"] == before["layers"]
    assert len(rows(tmp_path, "layer")) == NUM_BLOCKS * 7
    assert len(rows(tmp_path, "tune")) == len(rows(tuned.path, "tune"))


@pytest.mark.parametrize("saved_at", ["every step", pytest.param("looks", marks=pytest.mark.slow)])
def test_resumes_at_any_step_with_the_same_bytes(tuned, saved_at, monkeypatch):
    monkeypatch.setattr(tune_model, "_SAVE_SECONDS", 0.0 if saved_at == "every step" else 1e9)
    name = f"killed {saved_at}"
    calls, update = [], Student.update

    def killing(self, *arguments):
        calls.append(None)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        return update(self, *arguments)

    monkeypatch.setattr(Student, "update", killing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tuned.tune(name)
    path, summary = tuned.tune(name)
    assert len(calls) == 6 + 2 + {"every step": 0, "looks": 1}[saved_at]
    manifest = "checkpoint/manifest.json"  # it holds a SHA-256 of the arrays of every layer
    assert (path / manifest).read_bytes() == (tuned.path / manifest).read_bytes()
    for kinds in (("tune",), ("moved", "tuned")):
        assert rows(path, *kinds) == rows(tuned.path, *kinds)
    assert summary["comparison"] == tuned.summary["comparison"]


def test_a_finished_one_is_not_made_again(tuned, capsys, monkeypatch):
    monkeypatch.setattr(Student, "gradients", None)
    before = (tuned.path / "metrics.jsonl").read_bytes()
    _, summary = tuned.tune("whole")
    assert summary["comparison"] == tuned.summary["comparison"]
    assert (tuned.path / "metrics.jsonl").read_bytes() == before
    assert "holds the finished tuning" in capsys.readouterr().out


def test_another_config_on_an_old_directory_is_refused(tuned):
    with pytest.raises(ValueError, match=r"another config: finetune.learning_rate: 0.01 -> 0.02"):
        tuned.tune("whole", learning_rate=0.02)


def test_a_step_that_is_not_finite_leads_back(tuned, monkeypatch, caplog):
    """To the last look, with half the rates; another one does so again."""
    calls, gradients = [], Student.gradients

    def breaking(self, *arguments):
        calls.append(None)
        kl, found = gradients(self, *arguments)
        return (kl * np.nan if len(calls) in (4, 6) else kl), found  # of steps 4 and 4

    monkeypatch.setattr(Student, "gradients", breaking)
    path, summary = tuned.tune("nan")
    assert summary["tuning"]["tries"] == 2 and summary["tuning"]["steps"] == 6
    assert caplog.text.count("back to step 2, with half the learning rates") == 2
    found = [(row["step"], row["rate"]) for row in rows(path, "tune") if "loss" in row]
    good = [(row["step"], row["rate"]) for row in rows(tuned.path, "tune") if "loss" in row]
    assert found[:3] == good[:3] and found[-4:] == [(step, rate / 4) for step, rate in good[2:]]


def test_a_tuning_that_is_never_finite_stops(tuned):
    with pytest.raises(
        ValueError, match="not finite after step 1, as 3 times before .* lower fine"
    ):
        tuned.tune("diverges", learning_rate=1e9, scale_learning_rate=1e9)


def test_early_stop(tuned):
    _, summary = tuned.tune("stopped", patience=1, tolerance=0.9, epochs=5)
    assert summary["tuning"]["steps"] == 2


@pytest.fixture(scope="module")
def recoded(tuned, model_dir, text_files):
    """The same tuning by its command, with codes that are chosen again after every look."""
    f, path = tuned.config.finetune, tuned.directory / "recoded"
    lines = [f"config.finetune.{field} = {f[field]!r}" for field in f]
    config = config_file(tuned.directory / "config.py", model_dir, text_files, *lines)
    command = f"python scripts/finetune.py --checkpoint={tuned.checkpoint} --workdir={path}"
    command += f" --config={config}" + "".join(
        f" --config.finetune.{k}={v}" for k, v in CODES.items()
    )
    with pytest.MonkeyPatch.context() as patch, parsed(command, patch) as script:
        script.main(sys.argv)
    return path, json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])


def codes_of(checkpoint):
    return {
        path: np.asarray(leaf.small_codes())
        for path, leaf in leaves(checkpoint)[1].items()
        if isinstance(leaf, QuantizedTensor)
    }


def test_codes_are_chosen_again_where_that_lowers_the_divergence(tuned, recoded):
    path, summary = recoded
    tried = rows(path, "codes")
    assert [row["step"] for row in tried] == [2, 4, 6]
    part = 1.0
    for row in tried:
        assert row["part"] == part and 0 < row["changed"] <= 0.03 * part * row["vectors"]
        assert row["kept"] == (row["held_out_after"] < row["held_out_before"])
        look = next(r for r in rows(path, "tune") if r["step"] == row["step"] and "held_out" in r)
        assert row["held_out_before"] == look["held_out"]
        part *= 1.0 if row["kept"] else 0.5
    kept = [row for row in tried if row["kept"]]
    tuning = summary["tuning"]
    assert (tuning["recoded"], tuning["kept"]) == (3, len(kept)) and kept
    assert tuning["held_out_after"] <= min(row["held_out_after"] for row in kept)
    assert tuning["held_out_after"] < tuned.summary["tuning"]["held_out_after"]
    before, after = codes_of(tuned.checkpoint), codes_of(path / "checkpoint")
    changed = sum(int((after[name] != codes).sum()) for name, codes in before.items())
    assert 0 < changed <= sum(row["changed"] for row in kept)
    with pytest.MonkeyPatch.context() as patch:  # of what is written
        patch.setattr(tuned, "path", path)
        patch.setattr(tuned, "summary", summary)
        assert divergence_of(tuned) == pytest.approx(tuning["held_out_after"], rel=1e-4)


def test_codes_that_raise_the_divergence_are_reverted(tuned):
    """Then nothing is left of them: the tuning without them, to the last byte."""
    path, summary = tuned.tune(
        "reverted", codes=True, codes_share=1.0, codes_rate=1e3, codes_trust=1e3
    )
    assert [(r["part"], r["kept"]) for r in rows(path, "codes")] == [
        (1.0, False),
        (0.5, False),
        (0.25, False),
    ]
    assert summary["tuning"]["recoded"] == 3 and summary["tuning"]["kept"] == 0
    layers = [
        json.loads((p / "checkpoint" / "manifest.json").read_text())["layers"]
        for p in (path, tuned.path)
    ]
    assert layers[0] == layers[1]
    assert rows(path, "tune", "moved") == rows(tuned.path, "tune", "moved")


def test_with_codes_it_resumes_to_the_same_bytes(tuned, recoded, monkeypatch):
    monkeypatch.setattr(tune_model, "_SAVE_SECONDS", 0.0)
    calls, update = [], Student.update

    def killing(self, *arguments):
        calls.append(None)
        if len(calls) in (4, 6):  # codes of the best states are those of the states, and older
            raise KeyboardInterrupt
        return update(self, *arguments)

    monkeypatch.setattr(Student, "update", killing)
    name = "recoded and killed"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tuned.tune(name, **CODES)
    path, summary = tuned.tune(name, **CODES)
    manifest = "checkpoint/manifest.json"
    assert (path / manifest).read_bytes() == (recoded[0] / manifest).read_bytes()
    for kinds in (("tune", "codes"), ("moved", "tuned")):
        assert rows(path, *kinds) == rows(recoded[0], *kinds)
    assert summary["comparison"] == recoded[1]["comparison"]


def test_codes_of_other_states_come_back_from_a_saved_one(tuned, tmp_path):
    """Of the states and the best: shared, only of one of them, and other ones of the same leaf."""
    from gptvq_jax.run.student import Teacher
    from gptvq_jax.run.tune_state import Place, load, save
    from gptvq_jax.storage.checkpoint import PackedCheckpoint

    packed = PackedCheckpoint(tuned.checkpoint)
    student = Student(packed, Teacher(packed.config, {}), 1, Stopwatch())
    start = student.states()
    names = [name for name, leaf in student.leaves.items() if leaf.codes is not None]

    def with_codes(states, added, of):
        found = {n: states[n]._replace(codes=(student.leaves[n].codes + added) % 4) for n in of}
        return {**states, **found}

    shared = with_codes(start, 1, names[:2])
    now, best = with_codes(shared, 2, names[2:4]), with_codes(shared, 3, names[3:5])
    save(tmp_path, Place(3, now, best, now, 0.5, codes_part=0.25, recoded=2), student.leaves)
    place = load(tmp_path, start, student.leaves)
    assert (place.step, place.codes_part, place.recoded) == (3, 0.25, 2)
    for found, expected in ((place.states, now), (place.good, now), (place.best, best)):
        for name, state in expected.items():
            one, other = (jax.tree.leaves(s) for s in (found[name], state))
            assert len(one) == len(other)
            for a, b in zip(one, other, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"codes_metric": "l2"}, {"codes_share": 0.1}, {"codes_rate": 3.0}, {"codes_trust": 1e-3}],
)
def test_every_field_of_codes_counts(tuned, recoded, changes):
    path, _ = tuned.tune(str(changes), **{**CODES, **changes})
    assert rows(path, "codes") != rows(recoded[0], "codes")
    path, _ = tuned.tune("every other look", **CODES, codes_every=2)
    assert [row["step"] for row in rows(path, "codes")] == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.0},
        {"scale_learning_rate": 0.0, "norm_learning_rate": 0.0},
        {"seed": 1},
        {"b1": 0.5},
        {"b2": 0.5},
        {"weight_decay": 0.9},
        {"warmup": 0.5},
        {"final_rate": 1.0},
    ],
)
def test_every_field_counts(tuned, changes):
    path, _ = tuned.tune("-".join(f"{k}{v}" for k, v in changes.items()), **changes)
    moved = {(r["leaf"], r["parameter"]): r["moved"] for r in rows(path, "moved")}
    whole = {(r["leaf"], r["parameter"]): r["moved"] for r in rows(tuned.path, "moved")}
    assert moved != whole
    for (_, parameter), distance in moved.items():
        if "learning_rate" in changes:
            assert (distance == 0) == (parameter == "centroids")
        if "scale_learning_rate" in changes:
            assert (distance == 0) == (parameter != "centroids")


def test_another_model_is_refused(tuned, tmp_path):
    other = tmp_path / "other"
    tokenizer = open_source(tuned.config.model).tokenizer
    write_random_llama(other, tokenizer, NUM_BLOCKS, hidden=48, head_dim=16, seed=5)
    with pytest.raises(ValueError, match=r"other .* is not the model that .*checkpoint was made "):
        tuned.tune("other", model=str(other))


def test_a_model_that_is_gone_is_named(tuned, tmp_path):
    moved = tmp_path / "checkpoint"
    shutil.copytree(tuned.checkpoint, moved)
    manifest = moved / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(re.sub(r'"model": "[^"]*"', '"model": "/gone"', text, count=1))
    with pytest.raises((ValueError, OSError), match="'/gone', cannot be opened: .* with --model"):
        finetune(str(moved), str(tmp_path / "out"), tuned.config)
    path = tmp_path / "with"
    finetune(str(moved), str(path), tuned.config, model=tuned.config.model)
    found = rows(path, "tuned")
    assert found == rows(tuned.path, "tuned")


@pytest.mark.parametrize(
    "field, message",
    [
        ("vq.bits", r"vq\.bits has no effect on a checkpoint whose codes are there; finetune\.\*"),
        ("calibration.num_windows", "calibration.num_windows has no effect"),
        ("model", "name the float model with --model"),
        ("tune.block", "tune.block has no effect"),
    ],
)
def test_fields_that_do_not_count_are_refused(tuned, field, message):
    with pytest.raises(ValueError, match=message):
        tuned.tune("refused", given=[field])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_windows": 4}, "batch_size=8 must be at most finetune.num_windows=4; lower it"),
        ({"micro_batch": 3}, "micro_batch=3 must be a divisor of finetune.batch_size=8"),
        ({"held_out": 0}, "held_out=0 must be at least 1"),
        ({"codes_share": 0.0}, "codes_share=0.0 must be above 0 and at most 1"),
        ({"codes_metric": "l1"}, "codes_metric='l1' must be hessian or l2"),
        ({"codes_every": 0}, "codes_every=0 must be at least 1"),
        ({"codes_rate": 0.0}, "codes_rate=0.0 must be above 0"),
        ({"codes_trust": 0.0}, "codes_trust=0.0 must be above 0"),
        ({"norm_learning_rate": -1.0}, "norm_learning_rate=-1.0 must be 0"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        FinetuneSettings(**changes)
