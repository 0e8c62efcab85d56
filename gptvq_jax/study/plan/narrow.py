"""What a run does not multiply as float32, and the seconds of products on a device as published."""

import dataclasses
from collections.abc import Mapping

from gptvq_jax.config import RunSettings
from gptvq_jax.core.flops import unit
from gptvq_jax.core.products import BFLOAT16, BFLOAT16X3, FLOAT32
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.run import work
from gptvq_jax.run.formats import layer_format, linear_layers, num_quantized
from gptvq_jax.run.forward import wants_middle
from gptvq_jax.study.plan.devices import REACHED, Device

_PASSES = {BFLOAT16: 1, BFLOAT16X3: 3}


def narrow_flop(
    config: ModelConfig, settings: RunSettings, flop: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """{stage: {products: FLOP}} of what is not multiplied as float32; the rest of a stage is.

    Args:
      config: of the model.
      settings: of the run.
      flop: of all stages, as work.run_flop counts.
    """
    c, found = settings.calibration, {}
    sums = _sums_flop(config, settings) if "hessians" in flop else 0.0
    if c.model_products != FLOAT32:
        for stage in ("forward", "hessians", "advance"):
            own = flop.get(stage, 0.0) - (sums if stage == "hessians" else 0.0)
            _add(found, stage, c.model_products, own)
    if c.products != FLOAT32:
        of_curves = work.gradients_flop(config, without_budget(settings))
        _add(found, "hessians", c.products, sums)
        _add(found, "gradients", c.products, flop.get("gradients", of_curves) - of_curves)
    if settings.solve_products != FLOAT32 and wants_middle(settings):
        layers = linear_layers(settings, config).items()
        coded = [shape for layer, shape in layers if layer_format(settings, *layer).coder]
        _add(found, "quantize", settings.solve_products, 2.0 * sum(unit(*s) for s in coded))
    if settings.evaluation.products != FLOAT32:
        _add(found, "evaluate", settings.evaluation.products, flop.get("evaluate", 0.0))
    return found


def _sums_flop(config: ModelConfig, settings: RunSettings) -> float:
    """Of the moments of the pass that quantizes."""
    tokens = settings.calibration.all_windows * settings.calibration.seqlen
    blocks = config.block_counts(num_quantized(settings, config)).items()
    crosses = wants_middle(settings)
    return sum(
        n * work.moments_flop(block, settings, tokens, range(work.LAST), crosses)
        for block, n in blocks
    )


def _add(found: dict[str, dict[str, float]], stage: str, products: str, flop: float) -> None:
    of_stage = found.setdefault(stage, {})
    of_stage[products] = of_stage.get(products, 0.0) + flop


def product_seconds(flop: float, narrow: Mapping[str, float], device: Device) -> float:
    """Of products, FLOP in all, of which some are narrow: {products: FLOP}."""
    wide = flop - sum(narrow.values())
    passes = sum(_PASSES[products] * own for products, own in narrow.items())
    return wide / (REACHED * device.float32) + passes / (REACHED * device.bfloat16)


def without_budget(settings: RunSettings) -> RunSettings:
    """The same run, with token weights alone in its gradients."""
    none = dataclasses.replace(settings.allocation, bits_per_value=0.0)
    groups = dataclasses.replace(settings.calibration, gradient_groups=settings.weight_groups)
    return dataclasses.replace(settings, allocation=none, calibration=groups)
