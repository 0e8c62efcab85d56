"""The job of benchmark_decode.py --model, on a tiny model."""

import json
import subprocess
import sys

import pytest
from documented import REPOSITORY
from tiny_checkpoint import TIED, write_checkpoint
from tiny_families import write_model

from gptvq_jax.study import token_benchmark
from gptvq_jax.study.token_benchmark import benchmark_token


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("tied") / "packed", TIED))


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.setattr(token_benchmark, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(token_benchmark, "matmul_rate", lambda: 1e11)


def test_every_implementation_and_batch_has_a_table(checkpoint, rates, capsys):
    found = benchmark_token(checkpoint, ["dense"], context=5, batches=[1, 2], repeats=1)
    assert [(s["name"], s["batch"], s["context"]) for s in found["steps"]] == [
        ("dense", 1, 5),
        ("dense", 2, 5),
    ]
    one, two = found["steps"]
    assert [row["part"] for row in one["rows"]] == [row["part"] for row in two["rows"]]
    assert (found["copy_bandwidth"], found["multiply_rate"]) == (1e10, 1e11)
    text = capsys.readouterr().out
    assert "a copy moves 10.0 GB/s, float32 products run at 0.100 TFLOP/s" in text
    assert "dense, batch 2, 5 tokens before" in text and text.count("the rest") == 2
    json.dumps(found)


def test_a_float_model_has_no_implementations(tmp_path, rates):
    model = str(write_model(tmp_path, "llama"))
    with pytest.raises(ValueError, match="--implementations has no effect on .*, whose weights"):
        benchmark_token(model, ["cpu"])
    found = token_benchmark._models(model, None)
    assert list(found) == ["dense"] and found["dense"].source.config.vocab_size == 64


def test_what_runs_is_what_is_named(checkpoint):
    found = token_benchmark._models(checkpoint, ["xla", "dense"])
    assert [each._packed for each in found.values()] == [True, False]
    assert [each._implementation for each in found.values()] == ["xla", "auto"]
    assert list(token_benchmark._models(checkpoint, None)) == ["auto"]


@pytest.mark.slow
def test_the_command_writes_its_figures(tmp_path):
    model = write_model(tmp_path / "hf", "llama")
    script = [sys.executable, REPOSITORY / "scripts/benchmark_decode.py"]
    flags = [f"--model={model}", "--context=7", "--repeats=1", f"--json={tmp_path / 'a.json'}"]
    done = subprocess.run([*script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (step,) = json.loads((tmp_path / "a.json").read_text())["steps"]
    assert (step["name"], step["context"]) == ("dense", 7)
    assert "dense, batch 1, 7 tokens before" in done.stdout
