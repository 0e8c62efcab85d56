"""Small sweeps on a tiny model, and what they made."""

import contextlib
import json
from collections import Counter

import pytest

from gptvq_jax.run import job
from gptvq_jax.run.evaluate import Evaluation
from gptvq_jax.run.float_moments import FloatMoments
from gptvq_jax.run.forward import Forward
from gptvq_jax.run.gradients import Backward
from gptvq_jax.run.quantize import Quantize
from gptvq_jax.study.sweep import start
from gptvq_jax.study.sweep.axes import axis, sweep

BLOCKS = 3


def run(config, path, *given, cells=None):
    return start.sweep(config, "tiny.py", given, str(path), cells)


def rows(path):
    lines = (path / "results.jsonl").read_text().splitlines()
    return {row["cell"]: row for row in map(json.loads, lines)}


def manifest(path):
    return (path / "checkpoint/manifest.json").read_bytes()


@contextlib.contextmanager
def counted():
    """Counts the blocks that passes visit, and texts that are tokenized."""
    begun: Counter[str] = Counter()

    def counting(name, function):
        def count(*args, **kwargs):
            begun[name(args[0])] += 1
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for visitor in (Forward, Backward, Quantize, FloatMoments):
            patch.setattr(visitor, "visit", counting(lambda v: type(v).__name__, visitor.visit))
        of_model = counting(lambda v: f"Evaluation {v.files.directory.name}", Evaluation.visit)
        patch.setattr(Evaluation, "visit", of_model)
        for text in ("calibration_tokens", "evaluation_tokens"):
            patch.setattr(job, text, counting(lambda _, text=text: text, getattr(job, text)))
        yield begun


def weighted(base):
    base.calibration.gradient_groups = 1
    return sweep("weighted", base, [axis("uniform.bits", (2, 3))])


def in_step(base):
    """Without gradients the float stream is made for all cells as well; one does not read it."""
    return sweep("in_step", base, [axis("calibration.asymmetry", (0.0, 0.25))])


def budgets(base):
    base.method, base.vq.seed = "gptvq", "mahalanobis"
    base.vq.group_size, base.vq.codebook_overhead = 0, 0.5
    base.allocation.bits, base.allocation.em_iterations = (0.5, 1.0), 1
    base.allocation.bits_per_value = 1.2
    return sweep("budgets", base, [axis("allocation.bits_per_value", (1.2, 1.4))])


def of_float_inputs(base):
    base.calibration.inputs, base.calibration.asymmetry = "float", 0.0
    base.true_sequential, base.calibration.gradient_groups = False, 1
    return sweep("of_float_inputs", base, [axis("uniform.bits", (2, 3))])


ONCE = {"Evaluation float": BLOCKS, "calibration_tokens": 1, "evaluation_tokens": 1}


EACH = {"Quantize": 2 * BLOCKS, "Evaluation quantized": 2 * BLOCKS}


UP_AND_DOWN = {"Forward": BLOCKS, "Backward": BLOCKS}


CASES = {
    weighted: {**ONCE, **EACH, **UP_AND_DOWN},
    in_step: {**ONCE, **EACH, "Forward": BLOCKS},
    budgets: {**ONCE, **EACH, **UP_AND_DOWN},
    of_float_inputs: {**ONCE, **EACH, **UP_AND_DOWN, "FloatMoments": BLOCKS},
}
