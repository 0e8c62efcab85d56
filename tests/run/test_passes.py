"""How often a run does what it does: blocks that are read and run, programs that are compiled."""

import contextlib
import json
from collections import Counter

import jax
import numpy as np
import pytest
from documented import parsed

from gptvq_jax.config import default_config
from gptvq_jax.models.hf_source import HFSource
from gptvq_jax.models.llama import get_layer
from gptvq_jax.models.stages import LINEAR_GROUPS, LINEAR_LAYERS
from gptvq_jax.run import evaluate, evaluate_job, finetune, forward, gradients, held_out, job
from gptvq_jax.run.calibrate import LAST

BLOCKS = 3
WINDOWS, HELD_OUT, TIME = 6, 4, 32  # of the two texts
ALL_WINDOWS = WINDOWS + 2  # with those that are held out


@pytest.fixture
def config(model_dir, text_files):
    """The defaults but for the model, the text, its length, and programs that compile soon."""
    config = default_config()
    config.model = str(model_dir)
    config.calibration.datasets, config.evaluation.dataset = text_files[:1], text_files[1]
    config.calibration.num_windows, config.calibration.seqlen = WINDOWS, TIME
    config.calibration.held_out = 2
    config.evaluation.num_windows, config.evaluation.seqlen = HELD_OUT, TIME
    config.vq.bits = 1.0
    return config


def with_budget(config):
    config.allocation.bits_per_value, config.allocation.bits = 1.5, (0.5, 1.0, 1.5)
    config.vq.codebook_overhead = 0.5


def weighted(config):
    config.calibration.gradient_groups = 1


def tuned(config):
    config.tune.block, config.tune.epochs = True, 1


# --- the float model

PROGRAMS = [
    (forward, "block_halves"),
    (gradients, "block_backward"),
    (held_out, "step"),
    (finetune, "block_forward"),
    (evaluate, "block_forward"),
]


@contextlib.contextmanager
def counted_blocks():
    """Counts tokens that layers of float blocks multiply, by program; and blocks that are read."""
    tokens, reads, read = Counter(), Counter(), HFSource.block
    kernels = []  # of float blocks

    def reading(source, index):
        reads[index] += 1
        block = read(source, index)
        kernels.extend(get_layer(block, name)["kernel"] for name in LINEAR_LAYERS)
        return block

    def counting(name, run):
        def count(config, block, x, *args, **kwargs):
            stages = range(*args[1:3]) if name == "step" else range(LAST)
            ran = [get_layer(block, n)["kernel"] for stage in stages for n in LINEAR_GROUPS[stage]]
            if any(kernel is known for kernel in ran for known in kernels):
                tokens[name] += x.shape[0] * x.shape[1]
            return run(config, block, x, *args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFSource, "block", reading)
        for module, name in PROGRAMS:
            patch.setattr(module, name, counting(name, getattr(module, name)))
        yield tokens, reads


@pytest.mark.parametrize("change, walks", [(None, 1), (tuned, 1), (weighted, 3), (with_budget, 3)])
def test_the_float_model_runs_once_over_a_text(config, tmp_path, change, walks):
    """And its evaluation reads no block of its own: it rides in the first walk."""
    if change is not None:
        change(config)
    config.vq.em_iterations, config.vq.polish_rounds = 1, 0
    with counted_blocks() as (tokens, reads):
        summary = job.quantize(config, str(tmp_path / "run"))
    expected = {"block_halves": ALL_WINDOWS, "block_forward": HELD_OUT}
    if walks == 3:  # gradients start from what the pass upwards has left
        expected["block_backward"] = ALL_WINDOWS
    assert tokens == {name: BLOCKS * count * TIME for name, count in expected.items()}
    assert reads == dict.fromkeys(range(BLOCKS), walks)
    alone = evaluate_job.evaluate(
        None,
        config.model,
        **{k: config.evaluation[k] for k in ("dataset", "num_windows", "seqlen")},
    )
    assert summary["perplexity_float"] == pytest.approx(alone, rel=1e-6)


# --- programs


@contextlib.contextmanager
def compilations():
    """Names of what is compiled meanwhile, or read from a cache of programs."""
    names = []

    def hear(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(kwargs.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def test_other_numbers_are_the_same_programs(config, tmp_path):
    """What no shape depends on may differ between two runs of a process.

    Tuning is another matter: its program is that of a block's plan.
    """
    with_budget(config)
    config.allocation.measured = 0  # or a plan has candidates whose program nobody has made
    jax.clear_caches()
    with compilations() as first:
        job.quantize(config, str(tmp_path / "first"))
    config.damping, config.seed = 0.03, 7
    config.allocation.bits_per_value, config.allocation.em_iterations = 1.4, 2
    config.vq.em_iterations, config.vq.update_iterations, config.vq.polish_rounds = 3, 3, 1
    config.vq.polish_tolerance = 0.01
    config.calibration.asymmetry, config.calibration.seed = 0.5, 3
    with compilations() as second:
        job.quantize(config, str(tmp_path / "second"))
    assert len(first) > 50 and second == []
    results = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    ]
    errors = [[row["relative_error"] for row in rows if "layer" in row] for rows in results]
    assert np.all(np.not_equal(*errors))


# --- the arithmetic

MULTIPLYING = {
    *("forward", "gradients", "allocation", "hessians", "quantize", "advance", "tune", "evaluate"),
}
IDLE = {"open model", "read text", "load block", "embed", "save", "elsewhere"}


def test_every_stage_that_multiplies_says_how_much(config, tmp_path, monkeypatch, capsys):
    with_budget(config)
    tuned(config)
    config.vq.em_iterations, config.vq.polish_rounds = 1, 0
    job.quantize(config, str(tmp_path / "run"))
    monkeypatch.setattr("gptvq_jax.study.matmul_rate.matmul_rate", lambda: 1e12)
    capsys.readouterr()
    command = f"python scripts/benchmark_pipeline.py --workdir={tmp_path / 'run'}"
    with parsed(command, monkeypatch) as script:
        script.main([])
    head, *lines = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    start = head.index("TFLOP") + len("TFLOP") - 9
    column = {line[:20].rstrip(): line[start : start + 9].strip() for line in lines}
    stages = {name: tflop for name, tflop in column.items() if not name.startswith(" ")}
    assert {name for name, tflop in stages.items() if tflop == "-"} == IDLE
    assert {name for name, tflop in stages.items() if tflop != "-"} == {*MULTIPLYING, "total"}
    parts = [float(stages[name]) for name in MULTIPLYING]
    assert min(parts) > 0 and sum(parts) == pytest.approx(float(stages["total"]), rel=0.01)
