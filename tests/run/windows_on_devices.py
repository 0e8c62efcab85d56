"""One device against eight, in a process that has eight of them on its CPU.

Seven windows, so that one of zeros fills the batch, in models with biases and with experts: neither
a bias nor the router may make such a window count.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from tiny_families import write_model

from gptvq_jax.config import CalibrationSettings
from gptvq_jax.core.mesh import use_devices, work_mesh
from gptvq_jax.models.open import open_source
from gptvq_jax.run import forward, gradients, held_out, spread, token_weights
from gptvq_jax.run.calibrate import LAST, batches, init_moments, step
from gptvq_jax.run.evaluate import evaluated
from gptvq_jax.run.held_out import Files, init_sums, run_windows

SEVEN = CalibrationSettings(num_windows=7, held_out=3, batch_size=4)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


ALL = slice(0, 7)  # seven windows in one batch


def weights_of(config, windows, groups=2):
    rng, shapes = np.random.default_rng(3), token_weights.shapes(config, (windows, 16), groups)
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def moments(source, weights):
    """Of both kinds of windows, and what leaves the block."""
    config, block = source.config, source.block(0)
    x, out = random(10, 16, 48), np.zeros((10, 16, 48), np.float32)
    states = tuple(random(10, 16, 48, seed=seed) for seed in range(1, 4))
    files = Files(x, reference=None if config.experts else states)
    sums = init_sums(config, block, range(LAST), weights, not config.experts)
    more = SEVEN, weights, out, source.block(1)
    return run_windows(config, block, files, 0, LAST, sums, *more), out


def backward(source, power):
    """Gradients, token weights and moments of seven windows."""
    config, block = source.config, source.block(0)
    x, dy = random(7, 16, 48), random(7, 16, 48, seed=1)
    of_tokens = weights_of(config, 7) if power else None
    sums = spread.partial_sums(init_moments(config, block, range(LAST), of_tokens))
    shared, windows = (block, power, True), (x, dy, spread.real(ALL))
    static = config, 2
    made, sums = spread.run(gradients._block_backward, static, shared, windows, sums, part=ALL)
    return made, spread.total(sums)


def losses(source):
    windows = np.random.default_rng(0).integers(3, 64, (5, 16)).astype(np.int32)
    with evaluated(source, windows, 4) as evaluation:
        return evaluation.losses()


def halves(source):
    config, block = source.config, source.block(0)
    return spread.run(forward._halves, (config,), block, random(7, 16, 48), part=ALL)[0]


def head(source):
    windows = random(7, 16, 48), np.full((7, 16), 5, np.int32)
    config, outer = source.config, source.outer()
    return spread.run(gradients._head_backward, (config,), outer, windows, part=ALL)[0]


def both(make, *arguments):
    found = []
    for count in (1, 8):
        use_devices(count)
        assert work_mesh().size == count
        found.append(jax.tree.map(np.asarray, make(*arguments)))
    return found


def check(name, one, eight):
    assert jax.tree.structure(one) == jax.tree.structure(eight), name
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        if a.dtype.kind == "i":
            np.testing.assert_array_equal(a, b, name)
        else:
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max(), err_msg=name)


def flops(source):
    """Of a device in the program that adds eight windows to moments: of one, and of eight."""
    config, block = source.config, source.block(0)
    x = random(8, 16, 48)
    empty = init_moments(config, block, range(LAST))
    one = step.lower(config, block, x, None, 0, LAST, empty).compile().cost_analysis()
    use_devices(8)
    program = spread._program(held_out._step, (config, 0, LAST), work_mesh())
    shared, sums = spread.on_all((block, None)), spread.partial_sums(empty)
    parts = (x, None, None, None, None)
    eight = program.lower(shared, parts, sums).compile().cost_analysis()
    return one["flops"], eight["flops"]


def main(directory, name):
    assert len(jax.local_devices()) == 8
    assert [part.stop - part.start for part in batches(7, 4, 8)] == [7]
    assert [part.stop - part.start for part in batches(48, 20, 8)] == [16, 16, 16]
    use_devices(8)
    assert spread.padding(7) == 1 and spread.real(slice(0, 8)) is None and spread.mine(ALL) == ALL
    source = open_source(str(write_model(Path(directory) / name, name)))
    check("moments", *both(moments, source, None))
    check("losses", *both(losses, source))
    if source.config.experts:
        for power in (0.0, 0.5):
            check(f"backward, power {power}", *both(backward, source, power))
    else:
        check("weighted moments", *both(moments, source, weights_of(source.config, 10)))
        check("backward", *both(backward, source, 0.5))
        check("forward", *both(halves, source))
        check("head", *both(head, source))
    one, eight = flops(source)
    print(json.dumps({"one": one, "eight": eight}))


if __name__ == "__main__":
    main(*sys.argv[1:])
