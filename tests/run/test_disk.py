"""What each pass needs on the disk against what it takes, and what a resumed run finds cut."""

import contextlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from steps import Steps

from gptvq_jax.config import from_config, to_dict
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import FullDiskError, directory_bytes
from gptvq_jax.models.llama import LINEAR_LAYERS
from gptvq_jax.models.open import open_source
from gptvq_jax.run import allocation, job
from gptvq_jax.run.gradients import peak_bytes, save_token_weights, steps
from gptvq_jax.run.sizes import stored_bytes
from gptvq_jax.run.streams import Streams
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


def weights(source, path, progress=None):
    with WorkDir(path, {}) as workdir:
        save_token_weights(source, TOKENS, 4, GROUPS, workdir, progress or Steps(), Stopwatch())


def quantize(config, path, limit=None):
    """A run, or its beginning up to the given number of steps."""
    bar = Steps(limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Progress", lambda *_: contextlib.nullcontext(bar))
        patch.setattr(job, "perplexity", lambda *_: 2.0)
        with pytest.raises(KeyboardInterrupt) if limit else contextlib.nullcontext():
            job.quantize(config, str(path))
    return bar


@pytest.fixture
def cheap(tiny_config):
    """Nothing to solve, and both streams of activations."""
    tiny_config.method, tiny_config.calibration.asymmetry = "rtn", 0.25
    return tiny_config


# --- what a pass needs ---


def test_gradients_take_what_was_said(source, tmp_path, peak):
    weights(source, tmp_path / "run")
    said = peak_bytes(source.config, TOKENS.shape, GROUPS, source.config.num_hidden_layers)
    assert 0.9 * said < peak["gradients"] <= said


def test_gradients_are_refused_before_any_work_and_resume_with_just_enough(
    source, tmp_path, monkeypatch
):
    depth, path = source.config.num_hidden_layers, tmp_path / "run"
    most = peak_bytes(source.config, TOKENS.shape, GROUPS, depth)
    with monkeypatch.context() as patch, pytest.raises(FullDiskError, match="make room") as caught:
        free(patch, most - 1)
        weights(source, path)
    assert str(path) in str(caught.value)
    assert directory_bytes(path / "gradients") == 0
    for limit in (2, depth + 1):  # forward, and after one block backward
        with pytest.raises(KeyboardInterrupt):
            weights(source, path, Steps(limit))
        done = depth - max(0, limit - depth)
        needs = peak_bytes(source.config, TOKENS.shape, GROUPS, done)
        # Nothing in the directory is in the way of what is still to be written.
        needs -= directory_bytes(path / "gradients")
        with monkeypatch.context() as patch, pytest.raises(FullDiskError):
            free(patch, needs - 1)
            weights(source, path)
        with monkeypatch.context() as patch:
            free(patch, needs)
            weights(source, path)
        shutil.rmtree(path)
    assert steps(source.config) == 2 * depth


def test_curves_take_what_was_said(source, cheap, tmp_path, peak, monkeypatch):
    row = {"layer": "self_attn/o_proj", "dim": 2, "bits": 1.5, "loss": 1.2345678901234567e-123}
    row |= {"num_bytes": 10**9, "num_values": 10**9}

    def block_curves(source, settings, workdir, index, x, out, progress):
        out[0 : len(x)] = x[:]
        return [row] * len(LINEAR_LAYERS) * len(settings.candidates)

    monkeypatch.setattr(allocation, "_block_curves", block_curves)
    settings, depth = from_config(cheap), source.config.num_hidden_layers
    most = allocation.peak_bytes(source.config, TOKENS.shape, depth, len(settings.candidates))
    with WorkDir(tmp_path / "run", {}) as workdir:
        arguments = source, settings, workdir, TOKENS, depth, Steps(), Stopwatch()
        with monkeypatch.context() as patch, pytest.raises(FullDiskError):
            free(patch, most - 1)
            allocation.measure_curves(*arguments)
        allocation.measure_curves(*arguments)
    assert 0.7 * most < peak["all"] <= most


@pytest.mark.slow
def test_a_run_takes_what_was_said(source, cheap, tmp_path, peak, monkeypatch):
    path, settings = tmp_path / "run", from_config(cheap)
    with monkeypatch.context() as patch, pytest.raises(FullDiskError) as caught:
        free(patch, 10**5)
        quantize(cheap, path)
    assert "0.000100 GB are free" in str(caught.value)
    assert not (path / "checkpoint/outer").exists()
    quantize(cheap, path)  # the same again, with room
    shape = (cheap.calibration.num_windows, cheap.calibration.seqlen)
    with WorkDir(path, {**to_dict(settings), "weights": source.fingerprint}) as workdir:
        peaks = Streams(source, settings, workdir).peak_bytes
        streams, at_the_end = peaks(shape, 0, 3), [peaks(shape, done, 3) for done in (2, 3)]
    assert at_the_end == [streams * 4 // 6, 0]  # a resumed run is not refused for what is over
    assert 0.99 * streams < peak["activations"] <= streams
    assert 0.3 * stored_bytes(source.config, settings, {}) < peak["checkpoint"]
    assert peak["checkpoint"] <= stored_bytes(source.config, settings, {})


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
        with workdir.write_activations(3, (2, 3, 4), "curves") as out:
            out[0:2] = np.ones((2, 3, 4))
        loads = {
            "gradients/00003.npz": (workdir.load_token_weights, 3),
            "curves/00003.json": (workdir.load_curves, 3),
            "activations/00003.curves.npy": (workdir.load_activations, 3, "curves"),
        }
        for name, (load, *arguments) in loads.items():
            content = (tmp_path / name).read_bytes()
            folder = tmp_path / ("gradients" if "grad" in name else "curves")
            for damaged in (b"", content[: len(content) // 2], content[:-2], bytes(len(content))):
                (tmp_path / name).write_bytes(damaged)
                with pytest.raises(ValueError, match=f"{name} is damaged.*remove {folder} to"):
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
    for name in ("tokens.npy", "activations/00001.float.npy", "curves/00001.json"):
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
