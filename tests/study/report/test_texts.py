"""What models say: as they say it elsewhere, asked once, and quiet about what is not there."""

import json
import shutil
from types import SimpleNamespace

import pytest
from result_files import layer_row, summary_row, write_run
from tiny_checkpoint import random_block, write_checkpoint

import gptvq_jax
from gptvq_jax.run import job
from gptvq_jax.study.decode_formats import FORMATS
from gptvq_jax.study.report import texts
from gptvq_jax.study.report.html_text import escaped
from gptvq_jax.study.report.report import report
from gptvq_jax.study.report.results import read_results

PROMPTS = ("w3 w4", "w9")


@pytest.fixture
def run(model_dir, tmp_path):
    """What a run of a tiny model leaves, with a checkpoint of random codes."""
    path = write_run(tmp_path / "tiny", [layer_row(), summary_row()], {"model": str(model_dir)})
    blocks = [random_block(seed, fmt=FORMATS["2d_2.25"]) for seed in range(2)]
    write_checkpoint(path / "checkpoint", blocks=blocks)
    return path


def test_each_model_is_asked_once(run, model_dir, tmp_path, monkeypatch, capsys):
    page = report([run], tmp_path / "out", PROMPTS)
    said_first = "2 models to continue 2 prompts; --noprompts leaves that out"
    assert capsys.readouterr().out.splitlines()[0] == said_first
    (cell,) = read_results([run]).cells
    notes = []
    said = texts.said([cell], PROMPTS, tmp_path / "out/texts.jsonl", notes)
    assert notes == [] and list(said) == list(PROMPTS)
    assert all(list(answers) == [f"float ({model_dir})", "tiny"] for answers in said.values())
    text = page.read_text()
    for prompt, answers in said.items():
        assert f"<h3>{prompt}</h3>" in text
        assert all(escaped(answer.strip()) in text for answer in answers.values())

    def refuse(*_, **__):
        raise InterruptedError

    # What is known is not asked again, a new prompt is.
    monkeypatch.setattr(texts, "generate", refuse)
    assert report([run], tmp_path / "out", PROMPTS).read_text() == text
    with pytest.raises(InterruptedError):
        report([run], tmp_path / "out", ["w5"])
    (tmp_path / "out/texts.jsonl").write_text("{}\n")  # damaged: made again
    with pytest.raises(InterruptedError):
        report([run], tmp_path / "out", PROMPTS)


@pytest.mark.slow
def test_a_run_says_what_its_model_says(tiny_config, model_dir, tmp_path):
    path = tmp_path / "mine"
    job.quantize(tiny_config, str(path), command="python scripts/quantize.py --config=tiny.py")
    page = report([path], prompts=["etaoin shrdlu"])
    assert page == path / "report/index.html"
    assert "<code>python scripts/quantize.py --config=tiny.py</code>" in page.read_text()
    (cell,) = read_results([path]).cells
    (said,) = texts.said([cell], ["etaoin shrdlu"], path / "report/texts.jsonl", []).values()
    model = gptvq_jax.load(path / "checkpoint", "cpu")  # as a report, exact
    assert said["mine"] == model.generate("etaoin shrdlu", max_tokens=texts.MAX_TOKENS)
    assert said["mine"] != said[f"float ({model_dir})"]  # 1 bit of random weights


def test_small_models_are_asked_without_being_told(run, tmp_path, monkeypatch):
    asked = []

    def answers(model, prompts, _):
        asked.append(model.name)
        return ["" for _ in prompts]

    monkeypatch.setattr(texts, "_texts", answers)
    (cell,) = read_results([run]).cells
    said = texts.said([cell], (), tmp_path / "a.jsonl", [])
    assert list(said) == list(texts.PROMPTS) and len(asked) == 2
    monkeypatch.setattr(texts, "_SMALL", 1)
    notes = []
    assert texts.said([cell], (), tmp_path / "b.jsonl", notes) == {} and len(asked) == 2
    assert notes[0].startswith("tiny would take long to ask: what they say is left out; name pro")
    texts.said([cell], PROMPTS, tmp_path / "b.jsonl", [])
    assert len(asked) == 4


@pytest.mark.parametrize(
    "prompt, message",
    [("", "prompt 0 is empty"), ("w" * 5000, "prompt 0 has 5000 tokens; with max_tokens=32")],
)
def test_a_prompt_that_cannot_be_asked(prompt, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        report([run], tmp_path, [prompt])


def test_models_that_are_not_there(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(texts, "generate", lambda *_, **__: SimpleNamespace(tokens=[[3]]))
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "model": "package:other"}))
    (moved / "checkpoint/manifest.json").write_text("{}")
    plain = write_run(tmp_path / "plain", [layer_row(), summary_row()])
    report([moved, plain], tmp_path / "out", ["w3"])
    notes = capsys.readouterr().out
    assert "no texts of moved: " in notes and "no checkpoint of plain: what it says is" in notes
    shutil.copytree(run / "checkpoint", moved / "checkpoint", dirs_exist_ok=True)
    page = report([moved], tmp_path / "out", ["w3"])
    assert "no texts of float (package:other): unknown package" in capsys.readouterr().out
    assert "<dt>moved</dt>" in page.read_text()
