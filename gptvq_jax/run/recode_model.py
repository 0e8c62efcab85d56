"""Codes of the whole model chosen again: one pass up and down that holds a block's gradients.

Of the windows of a step the divergence is taken back through the model (run/student.py); at each
block, while it is there as weights, the gradient of every quantized weight says which of its
vectors get other codes (methods/recode_leaf.py). The metric of a layer is the second moment of what
it reads on these windows, in the model as it is: the Hessians that it was quantized with are gone
by then, and they were those of other text. Whether the new codes are kept is the caller's to say.

Costs beside those of a step's gradients: a block forward again for the Hessians, 2 N C^2 each for
its inputs of C columns, and for each weight a pass of coordinate descent over its vectors, or a
search over the chosen streams. Memory: the Hessians of a block, and the new codes.
"""

from typing import NamedTuple

import jax
import numpy as np

from gptvq_jax.config import FinetuneSettings
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.core.hessian import mean
from gptvq_jax.methods.recode_leaf import count_vectors, recode_leaf
from gptvq_jax.models import flops
from gptvq_jax.run import calibrate
from gptvq_jax.run.calibrate import LAST, Owner, init_moments, moment_flops, owners
from gptvq_jax.run.student import OfBlock, States, Student

_KERNEL = "/kernel"


class Recoded(NamedTuple):
    """States with other codes, and how many vectors or streams have them, of how many."""

    states: States
    changed: int
    vectors: int


def recode_model(
    student: Student,
    states: States,
    tokens: np.ndarray,
    reference: np.ndarray,
    settings: FinetuneSettings,
    part: float,
    stopwatch: Stopwatch,
) -> Recoded:
    """The states with other codes where gradients pull hardest; their parameters stay.

    Args:
      student: the packed model.
      states: of its leaves.
      tokens, reference: as `Student.gradients` takes them.
      settings: codes_share, codes_rate, codes_trust and codes_metric.
      part: of share and trust.
      stopwatch: receives the operations.
    """
    _, _, blocks = student.there_and_back(states, tokens, reference)
    found, changed, vectors = dict(states), [], 0
    for block in blocks:
        hessians = {}
        if settings.codes_metric == "hessian":
            hessians = _hessians(block, stopwatch)
        for name, gradient in block.of_weights.items():
            path = f"layers_{block.index}/{name}"
            leaf, state = student.coded(path, states), states[path]
            if leaf.codes is None:
                continue
            layer = name.removesuffix(_KERNEL)
            owner = owners(block.config, layer, None)[0]
            recoded = recode_leaf(
                leaf,
                state.params,
                gradient,
                hessians.get(owner),
                share=settings.codes_share,
                rate=settings.codes_rate,
                trust=settings.codes_trust,
                part=part,
            )
            found[path] = state._replace(codes=recoded.codes)
            changed.append(recoded.changed)
            vectors += count_vectors(leaf)
    return Recoded(found, sum(map(int, changed)), vectors)


def _hessians(block: OfBlock, stopwatch: Stopwatch) -> dict[Owner, jax.Array]:
    """Of what the layers of a block read."""
    moments = init_moments(block.config, block.params, range(LAST))
    for x in block.inputs:
        *_, moments = calibrate.step(block.config, block.params, x, None, 0, LAST - 1, moments)
        stopwatch.flops(flops.block_inputs(block.config, *x.shape[:2]))
        stopwatch.flops(moment_flops(block.config, moments, x.shape[0] * x.shape[1]))
    return {owner: mean(moment) for owner, moment in moments.inputs.items()}
