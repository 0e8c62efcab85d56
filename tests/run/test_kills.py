"""A run that is killed at any change of file names goes on to the same result, and redoes no block.

What is left of a killed process is what was on the disk: a run is copied at each change, and every
copy resumed. Where the process lives long enough to tidy up, as after Ctrl-C, it is interrupted.
"""

import shutil
from collections import Counter

import pytest
from kills import Changes, commit, result, run
from tiny_run import NUM_BLOCKS

from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.tree_io import damage


def every_pass(config):
    """Float streams from the walk up for the walk down, and then for the quantization."""
    in_step(config)
    config.vq.group_size, config.vq.codebook_overhead = 0, 0.5
    config.allocation.bits_per_value, config.allocation.bits = 1.2, (0.5, 1.0)
    config.allocation.em_iterations = 1
    config.calibration.gradient_groups = 1


def weighted(config):
    """Float streams are dropped by the walk down."""
    config.calibration.gradient_groups = 1


def in_step(config):
    """Float streams go with the quantization, block by block."""
    config.num_blocks, config.vq.seed = NUM_BLOCKS - 1, "mahalanobis"
    config.calibration.asymmetry, config.true_sequential = 0.25, True
    config.tune.block, config.tune.epochs = True, 1


class Whole:
    """A run that was left alone, with a copy of its directory at every change."""

    def __init__(self, config, path):
        self.config, self.copies = config, {}

        def copy(when):
            def keep(number):
                self.copies[when, number] = path / f"{when} {number}"
                shutil.copytree(path / "whole", self.copies[when, number])

            return keep

        with Changes(path / "whole", copy("before"), copy("after")).watched() as changes:
            visits = run(config, path / "whole")
        self.changes, self.result = changes.made, result(path / "whole")
        # The float model's pass has nothing to do in a block that stays dense.
        self.visits = {v: n for v, n in visits.items() if commit(v, NUM_BLOCKS) in changes.made}
        for part in ("outer", *(f"blocks/{i:05d}" for i in range(NUM_BLOCKS))):
            assert damage(path / "whole/checkpoint" / part) is None

    def is_resumed(self, path, made):
        """Whether a run goes on to the same result, and does what is left of it and no more."""
        visits = {v: n for v, n in run(self.config, path).items() if v in self.visits}
        left = {v for v in self.visits if commit(v, NUM_BLOCKS) not in made}
        assert set(visits) == left and set(visits.values()) <= {1}, made[-1:]
        assert result(path) == self.result, made[-1:]
        PackedCheckpoint(path / "checkpoint").packed_outer()


@pytest.fixture(params=[every_pass, weighted, in_step], ids=lambda change: change.__name__)
def whole(request, tiny_config, tmp_path):
    request.param(tiny_config)
    return Whole(tiny_config, tmp_path)


def test_the_changes_are_those_of_every_pass(whole, request):
    """Every file that a run makes, but for what Orbax writes, comes by a rename that is watched."""
    renamed = {change.split()[1] for change in whole.changes if change.startswith("replace")}
    made = {name for name in whole.result if not name.startswith("checkpoint/tokenizer")}
    assert made - {"metrics", "lock"} <= renamed
    assert all(count == 1 for count in whole.visits.values())
    depth = dict(Counter(name for name, _ in whole.visits))
    upwards = NUM_BLOCKS if "in_step" not in request.node.name else NUM_BLOCKS - 1
    expected = dict.fromkeys(depth, NUM_BLOCKS) | {"Forward": upwards}
    assert depth == expected
    passes = {name for name, _ in whole.visits}
    both = {"Evaluation of float", "Evaluation of quantized", "Quantize", "Forward"}
    down = set() if "in_step" in request.node.name else {"Backward"}
    assert passes == both | down
    assert not list((whole.copies["before", 0].parent / "whole/activations").iterdir())


@pytest.mark.parametrize(
    "when, step", [("before", 4), pytest.param("after", 1, marks=pytest.mark.slow)]
)
def test_killed_at_any_change(whole, when, step):
    """What is there after a change is what is there before the next one."""
    for number in range(0, len(whole.changes), step):
        made = whole.changes[: number + (when == "after")]
        whole.is_resumed(whole.copies[when, number], made)


@pytest.mark.parametrize("step", [11, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_at_any_change(whole, tmp_path, when, step):
    for number in range(0, len(whole.changes), step):
        path = tmp_path / f"{when} {number} interrupted"

        def interrupt(now, number=number):
            if now == number:
                raise KeyboardInterrupt

        hooks = (interrupt, len) if when == "before" else (len, interrupt)
        hooks = [hook if hook is interrupt else lambda now: None for hook in hooks]
        changes = Changes(path, *hooks)
        with changes.watched(), pytest.raises(KeyboardInterrupt):
            run(whole.config, path)
        whole.is_resumed(path, changes.made)
