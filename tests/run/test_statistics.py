"""Statistics in a file: what they are, that they add up, and a run that starts from them."""

import json
import shutil

import numpy as np
import pytest
from steps import Steps

from gptvq_jax.models.llama import block_forward_with_inputs, embed
from gptvq_jax.models.open import open_source
from gptvq_jax.models.stages import LINEAR_GROUPS
from gptvq_jax.run import job, statistics
from gptvq_jax.run.statistics import add, calibrate
from gptvq_jax.run.statistics_file import Statistics, write
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study.random_model import write_random_llama

START = {"calibration.inputs": "float", "true_sequential": False, "calibration.asymmetry": 0.0}


@pytest.fixture
def config(tiny_config):
    tiny_config.num_blocks, tiny_config.method, tiny_config.uniform.group_size = 2, "gptq", 16
    return tiny_config


def changed(config, **fields):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({name.replace("__", "."): v for name, v in fields.items()})
    return config


def contents(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "record"}


def test_statistics_are_sums_over_tokens_of_the_float_model(config, tmp_path, capsys):
    file = tmp_path / "a.npz"
    record = calibrate(config, str(file))
    assert "2 blocks, 192 tokens (6 x 32 tokens of" in capsys.readouterr().out
    assert (
        not (tmp_path / "a.npz.work").exists()
        and Statistics(file).record["parts"] == (record["parts"])
    )
    source, path = open_source(config.model), tmp_path / "run"
    job.quantize(changed(config, num_blocks=1), str(path))
    x, found = embed(source.config, source.outer(), np.load(path / "tokens.npy")), contents(file)
    assert len(found) == 2 * 2 * 2 * len(LINEAR_GROUPS)
    _, read = block_forward_with_inputs(source.config, source.block(0), x)
    for group in LINEAR_GROUPS:
        both = np.asarray(read[group[0]], np.float64)
        for kind, part in (("fitted", both[:6]), ("held_out", both[6:])):
            flat = part.reshape(-1, part.shape[-1])
            total = found[f"00000 {kind} {group[0]} 0 total"]
            expected = np.triu(flat.T @ flat)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(np.triu(total), expected, atol=5e-3 * scale)
            assert found[f"00000 {kind} {group[0]} 0 count"] == len(flat)


def test_a_run_from_statistics_is_the_run_on_their_text(config, tmp_path):
    """To the last bit; and it needs no text."""
    config = changed(config, **{name.replace(".", "__"): v for name, v in START.items()})
    whole = job.quantize(config, str(tmp_path / "whole"))
    calibrate(config, str(tmp_path / "a.npz"))
    own = changed(config, calibration__statistics=str(tmp_path / "a.npz"))
    own.calibration.datasets = ("nothing.txt",)
    summary = job.quantize(own, str(tmp_path / "run"))
    assert summary["bits_per_value"] == whole["bits_per_value"]
    assert summary["perplexity_quantized"] == whole["perplexity_quantized"]
    assert "a.npz, of 6 x 32 tokens" in summary["calibration"]
    rows = []
    for name in ("whole", "run"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        layers = [row for row in map(json.loads, lines) if row["kind"] == "layer"]
        rows.append([(row["relative_error"], row["held_out_error"]) for row in layers])
    assert rows[0] == rows[1] and len(rows[0]) == 14
    packed = [PackedCheckpoint(tmp_path / name / "checkpoint") for name in ("whole", "run")]
    layers = [checkpoint.manifest["layers"] for checkpoint in packed]
    assert layers[0] == layers[1]  # with the digests of their arrays
    calibrate(changed(config, num_blocks=1), str(tmp_path / "one.npz"))
    shutil.copy(tmp_path / "one.npz", tmp_path / "a.npz")
    with pytest.raises(ValueError, match="a.npz has statistics of 1 blocks, 2 are needed"):
        job.quantize(own, str(tmp_path / "run"))


def test_statistics_of_two_texts_add_up(config, text_files, tmp_path):
    files = {}
    for name, fields in {
        "a": {},
        "b": {"calibration__datasets": (text_files[1],), "calibration__num_windows": 4},
        "both": {
            "calibration__datasets": tuple(text_files),
            "calibration__dataset_weights": (6, 4),
        },
    }.items():
        files[name] = str(tmp_path / f"{name}.npz")
        if name == "both":
            fields |= {"calibration__num_windows": 10}
        # Windows that are held out would move the others.
        fields |= {"calibration__batch_size": 1, "calibration__held_out": 0}
        calibrate(changed(config, **fields), files[name])
    record = add([files["a"], files["b"]], str(tmp_path / "sum.npz"))
    assert [text["dataset"] for part in record["parts"] for text in part["texts"]] == text_files
    summed, parts = contents(tmp_path / "sum.npz"), [contents(files[name]) for name in "ab"]
    for name, total in summed.items():
        np.testing.assert_array_equal(total, parts[0][name] + parts[1][name])
    at_once = contents(files["both"])  # the same windows, read as one mixture
    for name, total in summed.items():
        if " fitted " in name:
            np.testing.assert_allclose(total, at_once[name], rtol=1e-3, atol=1e-3 * total.max())


def test_what_does_not_add_up_is_refused(config, text_files, model_dir, tmp_path):
    def made(name, **fields):
        path = str(tmp_path / name)
        calibrate(changed(config, num_blocks=1, **fields), path)
        return path

    first = made("a.npz")
    for fields, message in (
        (
            {"calibration__held_out": 3},
            "holds out 2 x 32 tokens of .* 3 x 32: one may be fitted to",
        ),
        ({"calibration__num_windows": 3}, "have the same windows of .* calibration.seed=0; make"),
    ):
        with pytest.raises(ValueError, match=message):
            add([first, made(f"{len(fields)}{message[:3]}.npz", **fields)], str(tmp_path / "sum"))
    add([first, made("seed.npz", calibration__seed=1)], str(tmp_path / "sum"))
    with pytest.raises(ValueError, match="sum is there already; name another file with --output"):
        add([first, first], str(tmp_path / "sum"))
    with pytest.raises(ValueError, match="alone is no sum; give --add once for each file"):
        add([first], str(tmp_path / "one"))
    two = str(tmp_path / "two.npz")
    calibrate(changed(config, calibration__seed=2), two)
    with pytest.raises(ValueError, match="make both with the same --config.num_blocks"):
        add([first, two], str(tmp_path / "more"))
    with pytest.raises(ValueError, match="a.npz holds other statistics; name another file"):
        calibrate(changed(config, num_blocks=1, calibration__seed=5), first)
    with pytest.raises(ValueError, match="--config.vq.dim has no effect on statistics, which"):
        calibrate(config, str(tmp_path / "c"), ["vq.dim"])
    write_random_llama(tmp_path / "model", open_source(config.model).tokenizer, 2, 48, 16, seed=3)
    other = made("other.npz", model=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="statistics of other weights"):
        add([first, other], str(tmp_path / "more"))


def test_stopped_statistics_go_on(config, tmp_path, monkeypatch):
    calibrate(config, str(tmp_path / "whole.npz"))

    class Stopped(Steps):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    bars = [Stopped(1)]
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "Progress", lambda *_: bars[0])
        with pytest.raises(KeyboardInterrupt):
            calibrate(config, str(tmp_path / "a.npz"))
    assert not (tmp_path / "a.npz").exists()
    made = tmp_path / "a.npz.work/moments/00000.npz"
    first = made.stat().st_mtime_ns
    read = statistics.calibration_tokens
    monkeypatch.setattr(statistics, "calibration_tokens", None)  # kept from the first start
    save, seen = statistics.FloatMoments.visit, []

    def visit(self, index, block):
        seen.append(index)
        assert made.stat().st_mtime_ns == first
        save(self, index, block)

    monkeypatch.setattr(statistics.FloatMoments, "visit", visit)
    calibrate(config, str(tmp_path / "a.npz"))
    assert seen == [1] and read is not None
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flip", "shape", "record", "none"])
def test_a_damaged_file_is_one_line(config, tmp_path, damage):
    path = tmp_path / "a.npz"
    record = calibrate(changed(config, num_blocks=1), str(path))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    elif damage in ("shape", "record"):
        arrays = {n.partition(" ")[2]: a for n, a in contents(path).items()}
        if damage == "shape":
            arrays["fitted mlp/down_proj 0 total"] = np.zeros((3, 3), np.float32)
        else:
            record = {**record, "parts": [{"texts": 3}]}
        write(path, record, [arrays], 0)
    else:
        path.unlink()
    run = changed(config, num_blocks=1, calibration__statistics=str(path))
    run.update_from_flattened_dict(START)
    error = FileNotFoundError if damage == "none" else ValueError
    words = "make it with scripts/calibrate.py" if damage == "none" else "make it again"
    with pytest.raises(error, match=words) as caught:
        job.quantize(run, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
