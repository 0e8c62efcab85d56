"""What survives a kill, a power loss and a full disk: the order of writes, and what is left."""

import errno
import fcntl
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import SafetensorError

from gptvq_jax.files import durable
from gptvq_jax.files.disk_space import FullDiskError, check_room, naming_full_disk
from gptvq_jax.files.new_directory import new_directory
from gptvq_jax.run import activations
from gptvq_jax.run.workdir import WorkDir
from gptvq_jax.storage import orbax_files, shards
from gptvq_jax.storage.shards import write_shards
from gptvq_jax.storage.tree_io import load_tree, save_tree

TREE = {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "norm": {"scale": np.ones(4)}}


@pytest.fixture
def calls(monkeypatch):
    """Paths that are synced, and (old, new) that are renamed, in their order."""
    made = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor):
        made.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(old, new):
        made.append((str(old), str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    return made


def assert_durable(calls, count):
    """Every rename comes after its content, and is itself on the disk before the next one."""
    renames = [i for i, call in enumerate(calls) if isinstance(call, tuple)]
    assert len(renames) == count
    for i, after in zip(renames, [*renames[1:], len(calls)], strict=True):
        old, new = calls[i]
        assert old in calls[:i]
        assert str(Path(new).parent) in calls[i + 1 : after]


# --- power loss ---


def commit_points(workdir):
    yield workdir.save_tokens, (np.zeros((2, 3), np.int32),)
    yield workdir.save_token_weights, (0, {"mlp/up_proj": np.ones((2, 3, 1), np.float32)})
    yield workdir.save_curves, (0, [{"loss": 1.0}])
    yield workdir.keep_metrics, ([{"kind": "layer"}],)

    def save_activations():
        with workdir.streams.write("quantized", 0, (2, 3, 4)) as out:
            out[0:2] = np.ones((2, 3, 4))

    yield save_activations, ()


def test_every_file_of_a_run_is_on_the_disk_before_its_name_and_its_name_before_the_next(
    tmp_path, calls
):
    with WorkDir(tmp_path / "new/run", {}) as workdir:
        assert_durable(calls, 1)  # config.json
        # Also the names of the directories that were made.
        assert {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new/run")} <= set(calls)
        for write, arguments in commit_points(workdir):
            calls.clear()
            write(*arguments)
            assert_durable(calls, 1)
        calls.clear()
        workdir.append_metrics([{"kind": "summary"}])
        assert calls == [str(workdir.path / "metrics.jsonl")]


def test_arrays_are_on_the_disk_before_the_record_that_counts_them(tmp_path, calls):
    save_tree(tmp_path / "tree", TREE, "float32")
    rename = next(i for i, call in enumerate(calls) if call[1] == f"{tmp_path}/tree/record.json")
    arrays = [str(path) for path in (tmp_path / "tree/arrays").rglob("*")]
    assert len(arrays) > 5 and set(arrays) <= set(calls[:rename])
    assert (
        str(tmp_path / "tree") in calls[:rename] and str(tmp_path / "tree") in calls[rename + 1 :]
    )


def test_a_directory_is_on_the_disk_before_its_name(tmp_path, calls):
    with new_directory(tmp_path / "out") as partial:
        write_shards([("a", np.ones(4)), ("b", np.ones(4))], partial, 32)
    written = [f"{partial}/{path.name}" for path in (tmp_path / "out").iterdir()]
    rename = calls.index((str(partial), str(tmp_path / "out")))
    assert len(written) == 3 and set(written) <= set(calls[:rename])
    assert calls[rename + 1] == str(tmp_path)


# --- a full disk ---


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_named(error, path):
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC
    message = str(error)
    assert message.startswith(f"[Errno 28] No space left on device: {path}")
    assert " needs " in message
    assert "\n" not in message and "make room and give the same command again" in message


def test_activations_are_reserved_before_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    path = tmp_path / "x.npy"
    with pytest.raises(FullDiskError) as caught, activations.writing(path, (10, 1000, 1000)):
        raise AssertionError
    assert_named(caught.value, path)
    assert "needs 0.020000 GB more" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_activations_are_written_where_nothing_can_be_reserved(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    x = np.arange(24).reshape(4, 2, 3)
    with activations.writing(tmp_path / "x.npy", x.shape) as out:
        out[2:4], out[0:2] = x[2:], x[:2]
        with pytest.raises(ValueError, match="must be"):
            out[0:2] = x[:1]
    stored = activations.Activations(tmp_path / "x.npy")
    for part in (slice(1, 3), slice(None), np.array([3, 0])):
        np.testing.assert_array_equal(stored[part].astype(int), x[part])


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_file_of_a_run_is_as_it_was_after_a_full_disk(tmp_path, monkeypatch, function):
    with WorkDir(tmp_path, {}) as workdir:
        for write, arguments in commit_points(workdir):
            write(*arguments)
        workdir.append_metrics([{"kind": "summary"}])
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for write, arguments in commit_points(workdir):
            with monkeypatch.context() as patch, pytest.raises(FullDiskError) as caught:
                patch.setattr(os, function, full)
                write(*arguments)
            assert_named(caught.value, tmp_path)
        if function == "fsync":
            with monkeypatch.context() as patch, pytest.raises(FullDiskError):
                patch.setattr(os, function, full)
                workdir.append_metrics([{"kind": "half"}])
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before
        for write, arguments in commit_points(workdir):  # the same again, with room
            write(*arguments)


def test_what_orbax_says_of_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def save(path, _):
        path.mkdir()
        (path / "half").touch()
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "a"\nNo space left on device [os_e]')

    with monkeypatch.context() as patch, pytest.raises(FullDiskError) as caught:
        patch.setattr(orbax_files.ocp, "save", save)
        save_tree(tmp_path / "tree", TREE, "float32")
    assert_named(caught.value, tmp_path / "tree")
    assert not list(tmp_path.iterdir())


def test_what_safetensors_says_of_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def save_file(tensors, path, metadata):
        Path(path).touch()
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", save_file)
    with pytest.raises(FullDiskError) as caught, new_directory(tmp_path / "out") as partial:
        write_shards([("a", np.ones(4))], partial, 100)
    assert_named(caught.value, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_room_is_compared_with_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    check_room(tmp_path, 10**9)
    with pytest.raises(FullDiskError) as caught:
        check_room(tmp_path / "not/there", 350 * 10**9)
    assert_named(caught.value, tmp_path / "not/there")
    assert "needs 350.00 GB more, and 1.00 GB are free" in str(caught.value)
    with pytest.raises(FullDiskError), new_directory(tmp_path / "out", 2 * 10**9):
        raise AssertionError
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full(small_disk, monkeypatch, capfd):
    """With files of every library, although there seemed to be room."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    noise = np.random.default_rng(0).normal(size=(400, 400)).astype(np.float32)

    def write_activations(path):
        with activations.writing(path, (4, 100, 1000)):
            raise AssertionError

    def write_directory(path):
        with new_directory(path) as partial:
            write_shards([("a", noise)], partial, 10**9)

    writes = [
        write_activations,
        write_directory,
        lambda path: save_tree(path, {"a": noise}, "float32"),
        # Several of Orbax's threads fail, each at its own time.
        lambda path: save_tree(path, {f"a{i}": noise[:20] for i in range(24)}, "float32"),
        lambda path: durable.write_text(path, "x" * 400_000),
        lambda path: durable.append_lines(path, [{"x": "x" * 400_000}]),
    ]
    for write in writes:
        with pytest.raises(FullDiskError) as caught:
            write(small_disk / "new")
        assert_named(caught.value, small_disk / "new")
        assert sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file()) == 0
    assert capfd.readouterr().err == ""


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("x"), OSError(errno.EACCES, "y"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, naming_full_disk(tmp_path):
            raise error
        assert caught.value is error


# --- two writers ---


def refused(message):
    return pytest.raises(ValueError, match=message)


@pytest.mark.parametrize("name", ["out.partial", "out.lock"])
def test_names_of_unfinished_directories_are_refused(tmp_path, name):
    with refused(rf"{name} ends in \..*; choose another"), new_directory(tmp_path / name):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_the_second_writer_of_a_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    with new_directory("real/out") as partial:
        (partial / "first").touch()
        for spelling in ("real/out", "link/out", tmp_path / "real/../real/out"):
            with refused("another process is writing .*real/out; wait"), new_directory(spelling):
                raise AssertionError
    assert [path.name for path in Path("real").iterdir()] == ["out"]
    assert [path.name for path in Path("real/out").iterdir()] == ["first"]


def test_what_a_killed_writer_left_is_in_nobodys_way(tmp_path):
    (tmp_path / "out.lock").touch()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/old").touch()
    with new_directory(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_writer_that_waited_for_nothing_sees_the_finished_directory(tmp_path, monkeypatch):
    """The first one finishes between the second one's look at the path and its lock."""
    flock = fcntl.flock
    first = new_directory(tmp_path / "out")
    (first.__enter__() / "first").touch()

    def late(descriptor, how):
        monkeypatch.undo()
        first.__exit__(None, None, None)  # removes the lock file that is open here
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with refused("is not an empty directory"), new_directory(tmp_path / "out"):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]


def test_a_link_to_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_directory(tmp_path / "link") as partial:
        (partial / "file").touch()
    assert (tmp_path / "real/file").exists() and (tmp_path / "link").is_symlink()


# --- names of directories ---

PLAIN = (
    *("with space", "a]b", "a{b}", "(x)", "it's", 'a"b', "50%", "#1", "$HOME", "~", "-dash"),
    *("dot.", "a\nb", "tab\there", "a:b", "a=b,c", "a;b&c|d", "!x", "ünï", "模型", "🙂", "n" * 200),
)


@pytest.mark.parametrize(
    "name", [os.path.join(*PLAIN), "run[1]", "[x]", "a*b", "what?", "back\\slash", "\\", "["]
)
def test_a_tree_is_stored_and_read_under_any_name(tmp_path, name):
    if name == "a*b":
        (tmp_path / "axb/tree").mkdir(parents=True)  # what a pattern would also find
    directory = tmp_path / name / "tree"
    save_tree(directory, TREE, "float32")
    loaded, _ = load_tree(directory)
    np.testing.assert_array_equal(loaded["kernel"], TREE["kernel"])
    directory.rename(tmp_path / "moved")
    loaded, _ = load_tree(tmp_path / "moved")
    np.testing.assert_array_equal(loaded["norm"]["scale"], TREE["norm"]["scale"])


def test_an_odd_name_with_an_odd_temporary_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "t[m]p").mkdir()
    monkeypatch.setattr(orbax_files.tempfile, "tempdir", str(tmp_path / "t[m]p"))
    with pytest.raises(ValueError, match="TMPDIR"):
        save_tree(tmp_path / "x[1]", TREE, "float32")
    save_tree(tmp_path / "plain", TREE, "float32")


def test_nothing_but_a_file_is_replaced(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), durable.replacing(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    durable.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
