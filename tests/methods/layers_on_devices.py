"""Layers on one device and on eight: a script that tests start, since devices are chosen at start.

Prints one JSON object: of each case that the command line names what differs, and FLOP per device;
where it names none, what differs of layers as a run quantizes them.
"""

import json
import sys

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core.hessian import Factor
from gptvq_jax.core.mesh import use_devices, work_mesh
from gptvq_jax.core.quantized_tensor import dequantize_compiled
from gptvq_jax.methods import aqlm, devices, gptvq, gptvq_settings, trellis, uniform
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.methods.layer import Objective, Problem, quantize_layers
from gptvq_jax.methods.trellis_settings import TrellisSettings
from gptvq_jax.methods.uniform import UniformSettings
from gptvq_jax.moves import nearest

KEY = jax.random.key(3)
VQ = dict(bits=1.5, group_size=2048, max_group_cols=32, block_size=16, em_iterations=3)
ALONE = dict(codebook_update="none", polish_rounds=0)  # every step is one of a group alone
AQLM = dict(code_bits=3, dim=4, block_size=16, em_iterations=3, rounds=2)
TRELLIS = dict(bits=2.5, window_bits=4, stream_rows=16, block_size=16)

# (method, settings, rows, whether a layer is cut into the parts of a CPU); 64 columns, 8 strips.
CASES = {
    "gptvq": (gptvq, GPTVQSettings(**VQ), 512, False),
    "gptvq parts": (gptvq, GPTVQSettings(**VQ), 512, True),
    "gptvq ragged": (gptvq, GPTVQSettings(**VQ), 521, False),
    "gptvq one strip": (gptvq, GPTVQSettings(**{**VQ, "group_size": 10**6}), 100, False),
    "gptvq block scales": (gptvq, GPTVQSettings(**VQ, **ALONE, scale_block_size=8), 512, False),
    "gptvq row scales": (gptvq, GPTVQSettings(**VQ, row_scales=True), 512, False),
    "gptvq svd": (gptvq, GPTVQSettings(**{**VQ, "bits": 3.0}, dim=1, svd_rank=2), 512, False),
    "gptvq adam": (gptvq, GPTVQSettings(**VQ, codebook_update="adam"), 512, False),
    "gptq": (uniform, UniformSettings(block_size=16, group_size=32), 512, False),
    "gptq ragged": (uniform, UniformSettings(block_size=16, group_size=32), 509, False),
    "aqlm": (aqlm, AQLMSettings(**AQLM), 512, False),
    "aqlm ragged": (aqlm, AQLMSettings(**AQLM), 509, False),
    "aqlm residual": (aqlm, AQLMSettings(**AQLM, start="residual", beam=2), 512, False),
    "aqlm random": (aqlm, AQLMSettings(**AQLM, seed="random"), 512, False),
    "aqlm adam": (aqlm, AQLMSettings(**AQLM, codebook_update="adam"), 512, False),
    "trellis": (trellis, TrellisSettings(**TRELLIS), 512, False),
    "trellis ragged": (trellis, TrellisSettings(**TRELLIS), 509, False),
    "trellis levels": (trellis, TrellisSettings(**TRELLIS, levels="8"), 512, False),
    "trellis int8": (trellis, TrellisSettings(**TRELLIS, form="int8"), 512, False),
}


class Counted:
    """A compiled function in whose place it counts the FLOP of what is computed."""

    flop = 0.0

    def __init__(self, function, first_array: int, static: int):
        self._function, self._arrays = function, slice(first_array, -static or None)

    def __call__(self, *args):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            return self._function(*args)  # as a part of another program
        compiled = self._function.lower(*args).compile()
        Counted.flop += compiled.cost_analysis()["flops"]
        return compiled(*args[self._arrays])


def measured(quantize) -> tuple[object, float]:
    Counted.flop = 0.0
    return quantize(), Counted.flop


def compare(method, settings, rows: int, in_parts: bool) -> dict:
    """What eight devices make of a layer that one makes."""
    problem = ref.problem(rows, 64, seed=1)
    arrays = [jnp.asarray(x) for x in (problem.weight, problem.hessian, problem.hinv_chol)]
    quantize = uniform.gptq if method is uniform else method.quantize
    parts = settings.parts(rows, 64) if in_parts else None

    def of_one():
        if parts is None:
            return quantize(*arrays, KEY, settings)
        grid, first_rows = parts
        return gptvq.concat_rows([
            quantize(
                arrays[0][row : row + grid.rows],
                *arrays[1:],
                KEY,
                settings,
                grid=grid,
                first_strip=row // grid.strip_rows,
            )
            for row in first_rows
        ])  # fmt: skip

    more = {} if parts is None else {"parts": parts}
    one, flop = measured(of_one)
    many, flop_of_each = measured(
        lambda: quantize(*arrays, KEY, settings, mesh=work_mesh(), **more)
    )
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    losses = [
        ref.loss(problem.weight, np.asarray(dequantize_compiled(t)), problem.hessian)
        for t in (one, many)
    ]
    return {
        "same kind": jax.tree.structure(one) == jax.tree.structure(many),
        "same bytes": all(np.array_equal(a, b) for a, b in leaves),
        "codes that differ": float(np.mean(np.asarray(one.codes) != np.asarray(many.codes))),
        "loss": losses[1] / losses[0] - 1,
        "flop": flop_of_each / flop,
        "bits": [one.bits_per_value, many.bits_per_value],
    }


def layers() -> dict:
    """What `quantize_layers` makes of row groups, a sample and a baseline, as `compare`."""
    problem = ref.problem(256, 64, seed=2)
    weight, hessian, hinv_chol = (
        jnp.asarray(x) for x in (problem.weight, problem.hessian, problem.hinv_chol)
    )
    objective = Objective(hessian, Factor(hinv_chol, 0.01), shift=0.01 * weight[:128])
    settings, whole = GPTVQSettings(**VQ, **ALONE), Objective(hessian, Factor(hinv_chol, 0.01))
    sample = settings.parts(256, 64)[0]
    problems = [
        Problem(gptvq.quantize, settings, weight, [objective] * 2, KEY, asymmetry=0.5),
        Problem(uniform.rtn, UniformSettings(), weight, [whole], KEY),
    ]
    sampled = [
        Problem(gptvq.quantize, settings, weight[: sample.rows], [whole], KEY, part_grid=sample)
    ]
    found = []
    for count in (1, 0):
        use_devices(count)
        made = quantize_layers(problems) + quantize_layers(sampled)
        assert all(leaf.committed is False for leaf in jax.tree.leaves(made[:2])) or count
        found.append(made)
    one, many = found
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    same = all(np.array_equal(a, b) for a, b in leaves)
    return {"same kind": jax.tree.structure(one) == jax.tree.structure(many), "same bytes": same}


if __name__ == "__main__":
    nearest._UNROLL = 4  # as in the fixture short_programs
    gptvq_settings._PART_ROWS = 64
    devices.program = Counted(devices.program, 3, 0)
    gptvq._quantize = Counted(gptvq._quantize, 0, 2)
    aqlm._quantize = Counted(aqlm._quantize, 0, 2)
    uniform._gptq = Counted(uniform._gptq, 0, 2)
    trellis._code = Counted(trellis._code, 0, 4)
    assert work_mesh().size == 8
    print(json.dumps({name: compare(*CASES[name]) for name in sys.argv[1:]} or layers()))
