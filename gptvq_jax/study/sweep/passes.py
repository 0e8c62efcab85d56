"""What cells share: passes over the float model, each made once, in a directory of its own.

    float       the texts, the evaluation of the float model, and its streams where these are read
    gradients   token weights, and error curves for budgets with equal candidates
    moments     Hessians, where all blocks read what the float model outputs

What a pass depends on is its key: two cells share it where their keys are equal. lending.py makes
them and hands them out.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from gptvq_jax.config import CALIBRATION_TEXT, RunSettings
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.source import ModelSource
from gptvq_jax.run import allocation, gradients
from gptvq_jax.run.activations import file_bytes
from gptvq_jax.run.float_moments import moments_bytes
from gptvq_jax.run.formats import num_quantized
from gptvq_jax.run.forward import wants_float, wants_middle

FLOAT, GRADIENTS, MOMENTS = "float", "gradients", "moments"


@dataclasses.dataclass(frozen=True)
class Pass:
    """That several cells may share.

    Attributes:
      kind: FLOAT, GRADIENTS or MOMENTS.
      key: all that the files depend on.
      settings: of a run that would make it.
      parents: passes that it starts from.
      points: of the float model's stream that it leaves, less one; 0: none.
      middle: whether the stream between the halves of blocks is left as well.
    """

    kind: str
    key: dict[str, Any]
    settings: RunSettings
    parents: tuple["Pass", ...] = ()
    points: int = 0
    middle: bool = False

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{digest[:12]}"


def passes_of(settings: RunSettings, source: ModelSource) -> list[Pass]:
    """The passes that a run needs, in their order, as it would make them alone."""
    c, e = settings.calibration, settings.evaluation
    blocks = num_quantized(settings, source.config)
    text = {name: getattr(c, name) for name in (*CALIBRATION_TEXT, "model_products", "statistics")}
    key = {
        "pass": FLOAT,
        "model": settings.model,
        "weights": source.fingerprint,
        "calibration": text,
        "evaluation": dataclasses.asdict(e),
    }
    points = source.config.num_hidden_layers if settings.weight_groups else blocks
    reads = bool(settings.weight_groups) or wants_float(settings)
    found = [Pass(FLOAT, key, settings, (), points * reads, wants_middle(settings))]
    if settings.weight_groups:
        key = {**key, "pass": GRADIENTS, "weight_groups": settings.weight_groups}
        key |= {"curves": _curves(settings)}
        found.append(Pass(GRADIENTS, key, settings, tuple(found)))
    if c.inputs == "float" and not settings.true_sequential and not c.statistics:
        key = {**found[-1].key, "pass": MOMENTS, "blocks": blocks, "products": c.products}
        key |= {"groups": c.gradient_groups, "power": c.gradient_power if c.gradient_groups else 0}
        found.append(Pass(MOMENTS, key, settings, tuple(found)))
    return found


def _curves(settings: RunSettings) -> dict[str, Any] | None:
    """All that the error curves of a run depend on, but for its text; None: there are none."""
    a, c = settings.allocation, settings.calibration
    if not a.bits_per_value:
        return None
    return {
        "candidates": [dataclasses.asdict(candidate) for candidate in settings.candidates],
        "allocation": {n: getattr(a, n) for n in ("measured", "em_iterations", "sample")},
        "run": {n: getattr(settings, n) for n in ("method", "damping", "seed", "num_blocks")},
        "recipe": settings.recipe,
        "weights": {
            n: getattr(c, n)
            for n in ("gradient_groups", "gradient_power", "expert_tokens", "products")
        },
    }


def shared(runs: Sequence[Sequence[Pass]]) -> list[list[Pass]]:
    """The passes of several runs, those of one name made one: it leaves what any of them reads."""
    found: dict[str, Pass] = {}
    for own in runs:
        for of_run in own:
            known = found.get(of_run.name, of_run)
            points = max(known.points, of_run.points)
            middle = known.middle or of_run.middle
            found[of_run.name] = dataclasses.replace(known, points=points, middle=middle)
    whole = {
        name: dataclasses.replace(p, parents=tuple(found[parent.name] for parent in p.parents))
        for name, p in found.items()
    }
    return [[whole[of_run.name] for of_run in own] for own in runs]


def pass_bytes(of: Pass, config: ModelConfig) -> int:
    """Most bytes that a pass leaves on the disk; what the held-out text leaves is not counted."""
    c, depth = of.settings.calibration, config.num_hidden_layers
    shape = c.all_windows, c.seqlen
    if of.kind == FLOAT:
        count = of.points * (1 + of.middle) + (of.points > 0)
        return count * file_bytes((*shape, config.hidden_size))
    blocks = num_quantized(of.settings, config)
    if of.kind == MOMENTS:
        counts = config.block_counts(blocks).items()
        return sum(count * moments_bytes(block, of.settings) for block, count in counts)
    measured = blocks * (of.settings.allocation.bits_per_value > 0)
    groups = of.settings.weight_groups
    size = sum(gradients.weight_bytes(config.of_block(i), shape, groups) for i in range(depth))
    return size + allocation.curve_bytes(config, of.settings, measured)
