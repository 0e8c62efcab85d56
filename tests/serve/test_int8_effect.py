"""What 'auto' is where a model generates: measured once, said in one line, never in the way."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoint import (
    MODEL,
    random_block,
    random_outer,
    tiny_tokenizer,
    write_checkpoint,
)

import gptvq_jax
from gptvq_jax.serve import evaluate_tasks as tasks_job
from gptvq_jax.serve import int8_effect
from gptvq_jax.serve.generate_text import generate_text
from gptvq_jax.serve.int8_effect import Effect, choose, measure, sample_tokens
from gptvq_jax.serve.loglikelihood import plan_batches, score_batch
from gptvq_jax.serve.params import implementations, packed_params
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter
from gptvq_jax.study.sample_tensors import TensorFormat

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)
INT8 = TensorFormat(2, 4, 1024, 256)


def write(directory: Path, loud: float, head: float) -> Path:
    """With one input of every product so large that rounding leaves little of the others."""
    outer = random_outer(7)
    outer["lm_head"]["kernel"] *= head
    writer = CheckpointWriter(directory)
    writer.write_outer(outer)
    writer.write_tokenizer(tiny_tokenizer())
    for seed in range(2):
        block = random_block(seed, MODEL, INT8)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[norm]["scale"][3] *= loud
        writer.write_block(seed, block)
    writer.finalize({"vq": {"dim": 2}}, MODEL, "tiny", "0123")
    return directory


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A checkpoint that rounded activations hardly change: all tokens are about as likely."""
    return write(tmp_path_factory.mktemp("quiet") / "packed", 1, 1e-3)


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """One that they change."""
    return write(tmp_path_factory.mktemp("loud") / "packed", 1e4, 1)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """An empty cache of effects; lists the checkpoints that were measured."""
    seen = []

    def counted(checkpoint, tokens):
        seen.append(checkpoint.directory)
        return measure(checkpoint, tokens)

    def cache(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    monkeypatch.setattr(int8_effect, "measure", counted)
    monkeypatch.setattr(int8_effect, "user_cache", cache)
    return seen


def line(capsys) -> str:
    """The one that says what was chosen."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (found,) = [text for text in lines if "'auto' takes" in text]
    return found


def test_a_small_effect_is_measured_once_and_taken(quiet, measured, capsys):
    texts = [generate_text(str(quiet), None, ["w5 w9 w3"], max_tokens=2) for _ in range(2)]
    assert texts[0] == texts[1] and measured == [quiet]
    out, errors = capsys.readouterr()
    assert out.count("tokens/s (cpu_int8)") == 2
    assert errors.count("blocks [") and errors.count("'auto' takes cpu_int8") == 2
    assert "(--implementation=cpu is exact)" in errors


def test_the_line_has_what_is_measured(quiet, measured, capsys):
    tokens = sample_tokens(PackedCheckpoint(quiet))
    found = measure(PackedCheckpoint(quiet), tokens)
    assert found.tokens == len(tokens) - 1 > 300
    assert 0 < abs(found.change) < int8_effect.LIMIT
    assert choose(PackedCheckpoint(quiet), "auto") == "cpu_int8"
    assert line(capsys) == (
        f"activations rounded to int8 change the perplexity of {found.tokens} tokens by "
        f"{100 * found.change:+.2f} %: 'auto' takes cpu_int8 (--implementation=cpu is exact)"
    )


def test_the_effect_is_that_of_whole_models(quiet):
    """With its head, which is rounded too."""
    checkpoint = PackedCheckpoint(quiet)
    tokens = sample_tokens(checkpoint)[:48]
    (batch,) = plan_batches([(tokens[:1], tokens[1:])], 1, 48)
    exact, rounded = (
        score_batch(MODEL, packed_params(checkpoint, name), batch)[0].logprob
        for name in ("cpu", "cpu_int8")
    )
    change = np.expm1((exact - rounded) / 47)
    assert measure(checkpoint, tokens).change == pytest.approx(change, rel=0.02, abs=1e-6)


def test_a_large_effect_is_not_taken(loud, measured, capsys):
    served = ServedModel(str(loud), None)
    assert implementations(served.params()) == ["cpu"]
    said = line(capsys)
    assert said.endswith(" %, not by less than 0.2 %: 'auto' takes cpu")
    assert implementations(served.params()) == ["cpu"]
    assert line(capsys) == said and measured == [loud]


def test_what_is_named_or_exact_is_never_measured(quiet, measured, capsys):
    for name in ("cpu", "cpu_int8", "xla"):
        assert implementations(ServedModel(str(quiet), None, name).params()) == [name]
    assert implementations(ServedModel(str(quiet), None, exact=True).params()) == ["cpu"]
    assert measured == [] and "auto" not in capsys.readouterr().err


def test_tasks_are_evaluated_exactly(quiet, monkeypatch):
    """The model's weights are asked for with the option that keeps them so."""

    class Stop(Exception):
        pass

    def served(*args, **options):
        assert options["exact"]
        raise Stop

    monkeypatch.setattr(tasks_job, "ServedModel", served)
    monkeypatch.setattr(tasks_job.importlib.util, "find_spec", lambda _: True)
    with pytest.raises(Stop):
        tasks_job.evaluate_tasks(str(quiet), None, ["mine"], version="1")


def test_load_takes_it_for_tokens_and_not_for_perplexity(quiet, measured, capsys):
    tokens = [[5, 9, 3, 7]]
    auto, exact, rounded = (gptvq_jax.load(quiet, n) for n in ("auto", "cpu", "cpu_int8"))
    text = " ".join(f"w{i % 40}" for i in range(64))
    assert auto.perplexity(text, seqlen=16) == exact.perplexity(text, seqlen=16)
    assert measured == []
    np.testing.assert_array_equal(auto.logits(tokens), rounded.logits(tokens))
    assert np.any(np.asarray(exact.logits(tokens)) != np.asarray(auto.logits(tokens)))
    assert measured == [quiet] and line(capsys)


def test_a_layer_without_such_a_kernel_leaves_all_as_it_was(tmp_path, measured, capsys):
    mixed = write_checkpoint(tmp_path / "packed")
    for _ in range(2):
        assert choose(PackedCheckpoint(mixed), "auto") == "auto"
    assert measured == [mixed] and "auto" not in capsys.readouterr().err


def test_another_model_or_kernel_is_measured_again(quiet, loud, measured, monkeypatch):
    for checkpoint in (quiet, loud, quiet):
        choose(PackedCheckpoint(checkpoint), "auto")
    assert measured == [quiet, loud]
    monkeypatch.setattr(int8_effect, "library_key", lambda: "kernels-of-another-processor")
    choose(PackedCheckpoint(quiet), "auto")
    assert measured == [quiet, loud, quiet]


@pytest.mark.parametrize("content", ["", "[]", '{"tokens": 5}', '{"tokens": 5, "change": "a"}'])
def test_a_damaged_file_is_measured_again(quiet, monkeypatch, tmp_path, content):
    monkeypatch.setattr(int8_effect, "user_cache", lambda name: tmp_path)
    monkeypatch.setattr(int8_effect, "measure", lambda *_: Effect(7, 0.0))
    assert choose(PackedCheckpoint(quiet), "auto") == "cpu_int8"
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    monkeypatch.setattr(int8_effect, "measure", lambda *_: Effect(7, 0.5))
    assert choose(PackedCheckpoint(quiet), "auto") == "cpu"
    assert json.loads(path.read_text()) == {"tokens": 7, "change": 0.5}


def test_without_a_cache_every_load_measures(quiet, measured, monkeypatch, tmp_path, capsys):
    def refuse(name):
        raise OSError("read-only")

    monkeypatch.setattr(int8_effect, "user_cache", refuse)
    assert [choose(PackedCheckpoint(quiet), "auto") for _ in range(2)] == ["cpu_int8"] * 2
    monkeypatch.setattr(int8_effect, "user_cache", lambda name: tmp_path / "file")
    (tmp_path / "file").touch()  # nothing can be written below it
    assert choose(PackedCheckpoint(quiet), "auto") == "cpu_int8"
    assert measured == [quiet] * 3


@pytest.mark.parametrize("change", [float("nan"), float("inf"), -0.3])
def test_what_is_no_small_change_is_not_taken(quiet, monkeypatch, tmp_path, change):
    monkeypatch.setattr(int8_effect, "user_cache", lambda name: tmp_path)
    monkeypatch.setattr(int8_effect, "measure", lambda *_: Effect(7, change))
    assert [choose(PackedCheckpoint(quiet), "auto") for _ in range(2)] == ["cpu"] * 2


def test_a_tokenizer_that_cannot_read_the_text_leaves_it_exact(quiet, measured, capsys, tmp_path):
    checkpoint = PackedCheckpoint(quiet)
    checkpoint.tokenizer = lambda text, **_: {"input_ids": [3, 99]}  # of 40
    assert choose(checkpoint, "auto") == "auto"
    assert "is not known" in line(capsys) and measured == []


def test_large_models_read_fewer_tokens(quiet, monkeypatch):
    checkpoint = PackedCheckpoint(quiet)
    everything = len(sample_tokens(checkpoint))
    for values, expected in ((135e6, everything), (1.1e9, 136), (7e9, 64)):
        monkeypatch.setattr(int8_effect, "float32_bytes", lambda _, n=values: int(4 * n))
        assert len(sample_tokens(checkpoint)) == expected


def test_other_platforms_and_missing_compilers_are_left_alone(quiet, measured, monkeypatch):
    def missing():
        raise NotImplementedError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(int8_effect, "library_key", missing)
        assert choose(PackedCheckpoint(quiet), "auto") == "auto"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose(PackedCheckpoint(quiet), "auto") == "auto"
    assert measured == []
