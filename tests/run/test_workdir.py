"""The work directory: what survives a kill, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from gptvq_jax.run import job
from gptvq_jax.run.workdir import WorkDir

CONFIG = {"vq": {"dim": 2}, "seed": 0}


@pytest.fixture
def workdir(tmp_path):
    with WorkDir(tmp_path / "run", CONFIG) as opened:
        yield opened


def test_changed_config_is_refused_with_the_difference(workdir):
    workdir.close()
    WorkDir(workdir.path, CONFIG).close()
    with pytest.raises(ValueError, match="vq.dim: 2 -> 4"):
        WorkDir(workdir.path, {"vq": {"dim": 4}, "seed": 0})


def test_unwritable_path_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--workdir"):
        WorkDir(tmp_path / "file" / "run", CONFIG)


def test_second_process_is_refused(workdir):
    with pytest.raises(ValueError, match="another process"):
        WorkDir(workdir.path, CONFIG)


def test_foreign_directory_is_refused(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ValueError, match="no work directory"):
        WorkDir(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "file, what",
    [
        ("sweep.json", "the directory of a sweep"),
        ("manifest.json", "a packed checkpoint"),
        ("model.safetensors", "a model"),
    ],
)
def test_the_directory_of_something_else_is_refused_as_it_is(file, what, tmp_path):
    (tmp_path / file).write_text("{}")
    message = f"{tmp_path} is {what}, which {file} in it says, .*; pass another --workdir"
    with pytest.raises(ValueError, match=message):
        WorkDir(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def save(workdir, point, x, stream="quantized"):
    with workdir.streams.write(stream, point, x.shape) as out:
        for i in range(len(x)):
            out[i : i + 1] = x[i : i + 1].astype(np.float32)


def test_activations_that_are_not_whole_do_not_count(workdir):
    x, streams = np.ones((2, 3, 4), ml_dtypes.bfloat16), workdir.streams
    save(workdir, 1, x)
    with pytest.raises(RuntimeError), streams.write("quantized", 1, x.shape) as out:
        out[0:1] = 2 * x[:1]
        raise RuntimeError
    with pytest.raises(RuntimeError), streams.write("quantized", 2, x.shape):
        raise RuntimeError
    np.testing.assert_array_equal(streams.read("quantized", 1)[:], x)
    assert streams.points("quantized") == [1]
    assert not list(workdir.path.rglob("*.partial"))


def test_activations_round_trip_and_drop(workdir):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16)
    streams = workdir.streams
    for point in range(4):
        save(workdir, point, x * point)
    loaded = streams.read("quantized", 1)
    assert loaded.shape == x.shape and len(loaded) == 2 and loaded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(loaded[0:1], x[:1])
    streams.drop("quantized", keep=range(1, 3))
    assert streams.points("quantized") == [1, 2]
    np.testing.assert_array_equal(streams.read("quantized", 2)[:], x * 2)
    with pytest.raises(
        ValueError, match=r"00000\.quantized\.npy is missing.*remove .*checkpoint to"
    ):
        streams.read("quantized", 0)
    streams.drop("quantized")
    assert streams.points("quantized") == []


@pytest.mark.parametrize("step, left", [(1, [2, 3]), (-1, [0, 1, 2])])
def test_what_lies_behind_a_walk_is_dropped_of_its_stream_alone(workdir, step, left):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16)
    streams = workdir.streams
    for point in range(4):
        save(workdir, point, x * point, "float")
        save(workdir, point, -x * point, "gradient")
    streams.drop_behind("float", 2, step)
    assert streams.points("float") == left
    assert streams.points("gradient") == [0, 1, 2, 3]
    np.testing.assert_array_equal(streams.read("float", 2)[:], x * 2)
    np.testing.assert_array_equal(streams.read("gradient", 2)[:], -x * 2)


def test_token_weights_round_trip(workdir):
    weights = {"mlp/up_proj": np.random.default_rng(0).random((2, 3, 4), np.float32)}
    assert not workdir.has_token_weights(7)
    with pytest.raises(ValueError, match=r"00007\.npz is missing.*remove .*gradients to start"):
        workdir.load_token_weights(7)
    workdir.save_token_weights(7, weights)
    assert workdir.has_token_weights(7)
    loaded = workdir.load_token_weights(7)
    assert loaded.keys() == weights.keys()
    np.testing.assert_array_equal(loaded["mlp/up_proj"], weights["mlp/up_proj"])


def test_half_written_files_do_not_count(workdir):
    (workdir.path / "tokens.npy.partial").write_bytes(b"half")
    assert workdir.load_tokens() is None
    workdir.append_metrics([{"kind": "layer", "block": 0}])
    with open(workdir.path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "lay')
    assert workdir.metrics() == [{"kind": "layer", "block": 0}]


def test_a_run_that_was_refused_at_its_start_may_be_corrected(tmp_path):
    def start(seed, *, begin=False):
        with WorkDir(tmp_path, {"seed": seed}) as workdir:
            if begin:
                workdir.save_tokens(np.zeros((1, 2), np.int32))
            raise ZeroDivisionError

    for seed, begin in ((0, False), (1, True), (1, False)):
        with pytest.raises(ZeroDivisionError):
            start(seed, begin=begin)
    with pytest.raises(ValueError, match="seed: 1 -> 2"):
        start(2)


def test_a_held_out_text_is_not_kept_of_a_run_that_was_refused(tiny_config, tmp_path):
    """Or the corrected run would be measured on it."""
    good = tiny_config.calibration.datasets
    tiny_config.calibration.datasets = (str(tmp_path / "none.txt"),)
    with pytest.raises((ValueError, OSError), match="none.txt"):
        job.quantize(tiny_config, str(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.npy"))
    tiny_config.calibration.datasets, tiny_config.method = good, "rtn"
    tiny_config.num_blocks = 1
    job.quantize(tiny_config, str(tmp_path / "run"))
    kept = np.load(tmp_path / "run/held_out.npy")
    assert kept.shape == (4, 32) and np.load(tmp_path / "run/tokens.npy").shape == (8, 32)
