"""What each pass needs on the disk against what it takes, and what a resumed run finds cut."""

import contextlib
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from first_passes import contents, find
from steps import Steps

from gptvq_jax.config import AllocationSettings, CalibrationSettings, RunSettings, from_config
from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import FullDiskError, directory_bytes
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.models.open import open_source
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.run import allocation, candidates, job, passes
from gptvq_jax.run.sizes import stored_bytes
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.storage.checkpoint import PackedCheckpoint

TOKENS = np.random.default_rng(0).integers(0, 256, (6, 32)).astype(np.int32)
GROUPS = 4


@pytest.fixture(scope="module")
def source(model_dir):
    return open_source(str(model_dir))


@pytest.fixture
def peak(tmp_path, monkeypatch):
    """Counts, whenever something goes to the disk, the bytes in the work directory's folders."""
    seen = dict.fromkeys(("gradients", "activations", "curves", "checkpoint", "all"), 0)
    sync = durable.sync

    def counting(path):
        now = {name: directory_bytes(tmp_path / "run" / name) for name in seen}
        now["all"] = sum(now.values())
        seen.update({name: max(seen[name], now[name]) for name in seen})
        sync(path)

    monkeypatch.setattr(durable, "sync", counting)
    return seen


def free(monkeypatch, num_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=num_bytes))


@pytest.fixture
def said(monkeypatch):
    """What passes have said that they need, the last one last."""
    needs, check = [], WorkDir.check_room

    def keeping(workdir, num_bytes, *kept):
        needs.append(num_bytes)
        check(workdir, num_bytes, *kept)

    monkeypatch.setattr(WorkDir, "check_room", keeping)
    return needs


def weighted(asymmetry):
    calibration = CalibrationSettings(
        num_windows=4, held_out=2, gradient_groups=GROUPS, asymmetry=asymmetry
    )
    return RunSettings(calibration=calibration)


def quantize(config, path, limit=None):
    """A run, or its beginning up to the given number of steps of the last pass."""
    bar = Steps(limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "Progress", lambda *_: contextlib.nullcontext(bar))
        with pytest.raises(KeyboardInterrupt) if limit else contextlib.nullcontext():
            job.quantize(config, str(path))
    return bar


@pytest.fixture
def cheap(tiny_config):
    """Nothing to solve, and both streams of activations."""
    tiny_config.method, tiny_config.calibration.asymmetry = "rtn", 0.25
    return tiny_config


# --- what a pass needs ---


@pytest.mark.parametrize("asymmetry", [0.0, 0.25])  # which wants the float streams kept
def test_gradients_take_what_was_said(source, tmp_path, peak, said, asymmetry):
    find(source, weighted(asymmetry), tmp_path / "run", TOKENS)
    (most,) = said
    assert (0.97 if asymmetry else 0.85) * most < peak["all"] <= most


@pytest.mark.parametrize("asymmetry", [0.0, 0.25])
def test_gradients_are_refused_before_any_work_and_resume_with_just_enough(
    source, tmp_path, monkeypatch, peak, said, asymmetry
):
    depth, path = source.config.num_hidden_layers, tmp_path / "run"
    arguments = source, weighted(asymmetry), path, TOKENS
    with monkeypatch.context() as patch, pytest.raises(FullDiskError, match="make room") as caught:
        free(patch, 0)
        find(*arguments)
    assert str(path) in str(caught.value)
    assert not any((path / "activations").iterdir()) and not (path / "gradients").exists()
    for limit in (2, depth + 1, depth + 2):  # forward, and after blocks backward
        with pytest.raises(KeyboardInterrupt):
            find(*arguments, limit)
        left = contents(path)
        with monkeypatch.context() as patch, pytest.raises(FullDiskError):
            free(patch, 0)
            find(*arguments)
        assert contents(path) == left
        # Nothing in the directory is in the way of what is still to be written.
        needs = said[-1] - sum(map(len, left.values()))
        with monkeypatch.context() as patch, pytest.raises(FullDiskError):
            free(patch, needs - 1)
            find(*arguments)
        peak.update(dict.fromkeys(peak, 0))
        with monkeypatch.context() as patch:
            free(patch, needs)
            find(*arguments)
        assert 0.85 * said[-1] < peak["all"] <= said[-1]
        shutil.rmtree(path)


def test_curves_take_what_was_said(source, tmp_path, peak, monkeypatch):
    row = {"layer": "self_attn/o_proj", "dim": 2, "bits": 1.5, "loss": 1.2345678901234567e-123}
    row |= {"measured": False, "num_bytes": 10**9, "num_values": 10**9}
    settings = RunSettings(
        vq=GPTVQSettings(group_size=0),
        calibration=CalibrationSettings(num_windows=4, held_out=2, asymmetry=0.0),
        allocation=AllocationSettings(bits_per_value=2.0, em_iterations=0),
    )
    count = len(settings.candidates)
    monkeypatch.setattr(candidates, "measure", lambda *_: [row] * len(LINEAR_LAYERS) * count)
    find(source, settings, tmp_path / "run", TOKENS)
    most = allocation.curve_bytes(source.config, settings, source.config.num_hidden_layers)
    assert 0.7 * most < peak["curves"] <= most


@pytest.mark.slow
@pytest.mark.parametrize("groups, sequential", [(0, False), (0, True), (1, True)])
def test_a_run_takes_what_was_said(source, cheap, tmp_path, peak, said, groups, sequential):
    cheap.calibration.gradient_groups, cheap.true_sequential = groups, sequential
    path, settings = tmp_path / "run", from_config(cheap)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FullDiskError) as caught:
        free(patch, 10**5)
        quantize(cheap, path)
    assert "0.000100 GB are free" in str(caught.value)
    assert not (path / "checkpoint/outer").exists()
    quantize(cheap, path)  # the same again, with room
    shape = (settings.calibration.all_windows, settings.calibration.seqlen)
    needs = [passes.peak_bytes(source.config, settings, shape, done) for done in range(4)]
    # A resumed run is not refused for what is over.
    assert needs == sorted(needs, reverse=True) and needs[0] > needs[2] > needs[3] == 0
    stored = stored_bytes(source.config, settings, {})
    assert said[-1] == needs[0] + stored
    if not groups:  # otherwise the gradients take more
        assert 0.99 * needs[0] < peak["activations"] <= needs[0]
    assert peak["activations"] <= max(said[-2:])
    assert 0.3 * stored < peak["checkpoint"] <= stored


# --- files that are cut ---


@pytest.fixture(scope="module")
def whole(model_dir, text_files, tmp_path_factory):
    """A config and the manifest of a run that was left alone."""
    path = tmp_path_factory.mktemp("whole")

    def manifest(config):
        if not (path / "checkpoint").exists():
            quantize(config, path)
        return (path / "checkpoint/manifest.json").read_bytes()

    return manifest


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def array_file(block):
    return max((block / "arrays").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)


@pytest.mark.parametrize("finished, what", [(1, "record"), (2, "arrays")])
def test_a_damaged_last_block_is_made_again(cheap, whole, tmp_path, caplog, finished, what):
    quantize(cheap, tmp_path, limit=finished * len(LINEAR_LAYERS) + 1)
    block = tmp_path / f"checkpoint/blocks/{finished - 1:05d}"
    cut(array_file(block) if what == "arrays" else block / "record.json")
    cut(tmp_path / "tokens.npy")
    bar = quantize(cheap, tmp_path)
    assert bar.skipped == (finished - 1) * len(LINEAR_LAYERS)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "\n" not in "".join(messages)
    assert "tokens.npy is damaged and made again" in messages[0]
    assert f"block {finished - 1} is made again: " in messages[1] and str(block) in messages[1]
    assert (tmp_path / "checkpoint/manifest.json").read_bytes() == whole(cheap)
    assert not list((tmp_path / "activations").iterdir())


def test_what_is_damaged_outside_the_blocks_is_stored_again(cheap, whole, tmp_path, caplog):
    quantize(cheap, tmp_path, limit=len(LINEAR_LAYERS) + 1)
    outer = tmp_path / "checkpoint/outer"
    cut(array_file(outer))
    tokenizer = tmp_path / "checkpoint/tokenizer/tokenizer.json"
    before = tokenizer.read_bytes()
    cut(tokenizer)
    bar = quantize(cheap, tmp_path)
    assert bar.skipped == len(LINEAR_LAYERS)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"outer/ is stored again: {outer}") and "\n" not in message
    assert tokenizer.read_bytes() == before
    assert (tmp_path / "checkpoint/manifest.json").read_bytes() == whole(cheap)
    PackedCheckpoint(tmp_path / "checkpoint").packed_outer()


def test_damaged_inputs_name_what_to_remove(cheap, whole, tmp_path):
    quantize(cheap, tmp_path, limit=2 * len(LINEAR_LAYERS) + 1)
    cut(tmp_path / "activations/00002.quantized.npy")
    message = rf"00002\.quantized\.npy is damaged: .*remove {tmp_path}/checkpoint to start again"
    with pytest.raises(ValueError, match=message) as caught:
        quantize(cheap, tmp_path)
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "checkpoint")
    quantize(cheap, tmp_path)
    assert (tmp_path / "checkpoint/manifest.json").read_bytes() == whole(cheap)


def test_other_damaged_files_name_what_to_remove(tmp_path):
    with WorkDir(tmp_path, {}) as workdir:
        workdir.save_token_weights(3, {"mlp/up_proj": np.ones((2, 3, 1), np.float32)})
        workdir.save_curves(3, [{"loss": 1.0}])
        streams = ("float", "gradient", "middle", "quantized")
        for stream in streams:
            with workdir.streams.write(stream, 3, (2, 3, 4)) as out:
                out[0:2] = np.ones((2, 3, 4))
        # Each stream is made with others.
        of_float, of_gradient = (f"activations/*.{stream}.npy" for stream in streams[:2])
        remove = dict(zip(streams, (of_float, of_gradient, of_float, "checkpoint"), strict=True))
        loads = {
            "gradients/00003.npz": ("gradients", workdir.load_token_weights, 3),
            "curves/00003.json": ("curves", workdir.load_curves, 3),
        }
        for stream, what in remove.items():
            loads[f"activations/00003.{stream}.npy"] = what, workdir.streams.read, stream, 3
        for name, (what, load, *arguments) in loads.items():
            content, what = (tmp_path / name).read_bytes(), re.escape(f"{tmp_path}/{what}")
            for damaged in (b"", content[: len(content) // 2], content[:-2], bytes(len(content))):
                (tmp_path / name).write_bytes(damaged)
                with pytest.raises(ValueError, match=f"{name} is damaged.*remove {what} to"):
                    load(*arguments)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff{}", b"null", bytes(20)])
def test_a_damaged_config_is_one_line(tmp_path, content):
    WorkDir(tmp_path, {}).close()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json is not the config of a run.*--workdir"):
        WorkDir(tmp_path, {})


def test_lines_that_are_no_rows_do_not_count(tmp_path):
    with WorkDir(tmp_path, {}) as workdir:
        workdir.append_metrics([{"kind": "layer", "block": 0}])
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write(b'\x00\x00\xff\n[1]\n"kind"\n{}\n')
        assert workdir.metrics() == [{"kind": "layer", "block": 0}]


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    WorkDir(tmp_path, {}).close()
    names = ("activations/00001.float.npy", "curves/00001.json", "evaluation/figures.npy")
    for name in ("tokens.npy", *names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.partial").touch()
    WorkDir(tmp_path, {}).close()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("spelling", ["link/run", "real/../real/run", "real/run"])
def test_a_second_run_is_refused_however_its_directory_is_spelled(tmp_path, monkeypatch, spelling):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with (
        WorkDir(tmp_path / "real/run", {}),
        pytest.raises(ValueError, match="another process is using the work directory"),
    ):
        WorkDir(spelling, {})
