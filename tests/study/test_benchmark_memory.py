"""Runs whose peaks are compared: what they are given."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from documented import parsed

from gptvq_jax.config import from_config
from gptvq_jax.run.overrides import settle


@pytest.mark.parametrize(
    "flag, method, budget", [("", "gptvq", 3.085), (" --method=gptq", "gptq", 0.0)]
)
def test_runs_are_of_the_default_job_or_of_one_format(flag, method, budget, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        work = Path(next(w for w in command if w.startswith("--workdir=")).partition("=")[2])
        work.mkdir()
        (work / "metrics.jsonl").write_text(json.dumps({"peak_memory_bytes": 1}) + "\n")
        return SimpleNamespace(returncode=0)

    with parsed(f"python scripts/benchmark_memory.py --depths=2{flag}", monkeypatch) as script:
        monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
        monkeypatch.setattr(
            "gptvq_jax.models.open.open_source", lambda _: SimpleNamespace(tokenizer=0)
        )
        monkeypatch.setattr("gptvq_jax.study.random_model.write_random_llama", lambda *a, **k: 0)
        script.main([])
    (command,) = commands
    words = [word for word in command[2:] if not word.startswith("--workdir")]
    with parsed(" ".join(["python scripts/plan.py", *words]), monkeypatch) as plan:
        config, _ = settle(plan._CONFIG.value, [])
    settings = from_config(config)
    assert (settings.method, settings.allocation.bits_per_value) == (method, budget)
    assert settings.calibration.num_windows == 8
