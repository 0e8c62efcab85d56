"""What models say: as they say it elsewhere, asked once, and quiet about what is not there."""

import json
import shutil

import pytest
from result_files import layer_row, summary_row, write_run

import gptvq_jax
from gptvq_jax.run import job
from gptvq_jax.study.report import texts
from gptvq_jax.study.report.report import report
from gptvq_jax.study.report.results import read_results

PROMPTS = ("etaoin shrdlu", "rats and")


@pytest.fixture(scope="module")
def run(model_dir, text_files, tmp_path_factory):
    """A run of a tiny model, with its command noted."""
    config = gptvq_jax.config.default_config()
    config.model, config.num_blocks = str(model_dir), 1
    config.method, config.uniform.bits, config.uniform.group_size = "rtn", 2, 16  # quick
    config.calibration.dataset, config.evaluation.dataset = text_files
    config.calibration.num_windows = config.evaluation.num_windows = 2
    config.calibration.seqlen = config.evaluation.seqlen = 32
    config.calibration.asymmetry = 0.0
    path = tmp_path_factory.mktemp("run") / "tiny"
    job.quantize(config, str(path), command="python scripts/quantize.py --config=tiny.py")
    return path


def test_a_run_before_and_after(run, model_dir, tmp_path, monkeypatch):
    page = report([run], tmp_path / "out", PROMPTS)
    (cell,) = read_results([run]).cells
    notes = []
    said = texts.said([cell], PROMPTS, tmp_path / "out/texts.jsonl", notes)
    model = gptvq_jax.load(run / "checkpoint")
    assert said[PROMPTS[1]]["tiny"] == model.generate(PROMPTS[1], max_tokens=texts.MAX_TOKENS)
    assert said[PROMPTS[1]]["tiny"] != said[PROMPTS[1]][f"float ({model_dir})"]  # 2 bits
    text = page.read_text()
    assert "What the models say" in text and all(prompt in text for prompt in PROMPTS)
    assert "<code>python scripts/quantize.py --config=tiny.py</code>" in text
    assert notes == []

    # Asked once: what is known is not asked again, a new prompt alone is.
    def refuse(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(texts, "generate", refuse)
    assert report([run], tmp_path / "out", PROMPTS).read_text() == text
    with pytest.raises(InterruptedError):
        report([run], tmp_path / "out", ["shrdlu"])
    (tmp_path / "out/texts.jsonl").write_text("{}\n")  # damaged: made again
    with pytest.raises(InterruptedError):
        report([run], tmp_path / "out", PROMPTS)


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
    [("", "prompt 0 is empty"), ("e" * 5000, "prompt 0 has 5000 tokens; with max_tokens=32")],
)
def test_a_prompt_that_cannot_be_asked(prompt, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        report([run], tmp_path, [prompt])


def test_models_that_are_not_there(run, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "model": "package:other"}))
    (moved / "checkpoint/manifest.json").write_text("{}")
    plain = write_run(tmp_path / "plain", [layer_row(), summary_row()])
    report([moved, plain], tmp_path / "out", ["etaoin"])
    notes = capsys.readouterr().out
    assert "no texts of moved: " in notes and "no checkpoint of plain: what it says is" in notes
    shutil.copytree(run / "checkpoint", moved / "checkpoint", dirs_exist_ok=True)
    page = report([moved], tmp_path / "out", ["etaoin"])
    assert "no texts of float (package:other): unknown package" in capsys.readouterr().out
    assert "<dt>moved</dt>" in page.read_text()
