"""How each layer of a model is quantized: the method of the run, a rule's, or what a plan says."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from gptvq_jax.config import RunSettings
from gptvq_jax.methods.layer import check_row_groups
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.shapes import outer_shapes
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.recipe import EMBEDDING, HEAD, check_used
from gptvq_jax.rule_settings import Format, choices, format_of, is_open
from gptvq_jax.rules import DENSE, rule_of

Plan = Mapping[tuple[int, str], Any]  # (block, layer) -> settings of the run's method


def num_quantized(settings: RunSettings, config: ModelConfig) -> int:
    """Blocks that are quantized; those after them stay dense."""
    depth = config.num_hidden_layers
    return min(settings.num_blocks or depth, depth)


def layer_name(block: int, layer: str) -> str:
    """As a recipe names it."""
    return f"layers_{block}/{layer}"


def linear_layers(
    settings: RunSettings, config: ModelConfig
) -> dict[tuple[int, str], tuple[int, int]]:
    """{(block, layer): (out, in)} of the blocks that are quantized."""
    return {
        (index, name): shape
        for index in range(num_quantized(settings, config))
        for name, shape in layer_shapes(config.of_block(index)).items()
    }


def routers(settings: RunSettings, config: ModelConfig) -> list[str]:
    """Names of the routers of experts, of the blocks that are quantized; they stay as they are."""
    experts = config.family.experts
    return [
        layer_name(index, f"{experts.module}/{experts.router}")
        for index in range(num_quantized(settings, config))
        if config.kinds[index].num_experts
    ]


def outer_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """{name in a recipe: (vocab, hidden)} of the embedding and of a head of its own."""
    shapes = {name.split(".")[-2]: shape for name, shape in outer_shapes(config).items()}
    return {name: shapes[name] for name in (EMBEDDING, HEAD) if name in shapes}


def layer_format(settings: RunSettings, index: int, layer: str, plan: Plan | None = None) -> Format:
    """Of a layer of a block; a plan has settings of those that a budget had a say in."""
    found = format_of(settings, layer_name(index, layer))
    planned = (plan or {}).get((index, layer))
    return found if planned is None else found._replace(settings=planned)


def outer_formats(settings: RunSettings, config: ModelConfig) -> dict[str, Format]:
    """{name: how it is stored} of `outer_matrices`: a rule's, or as `embeddings` says."""
    formats = {}
    for name in outer_matrices(config):
        formats[name] = Format(settings.embeddings, None)
        if rule_of(settings.recipe, name):
            try:
                formats[name] = format_of(settings, name)
            except ValueError as error:
                raise ValueError(f"config.recipe: {name}: {error}") from None
    return formats


def dense_layers(settings: RunSettings, config: ModelConfig) -> list[str]:
    """Names of the layers that a rule keeps dense: they count among a model's bits."""
    return [
        layer_name(*layer)
        for layer in linear_layers(settings, config)
        if layer_format(settings, *layer).method == DENSE
    ]


def check_formats(settings: RunSettings, config: ModelConfig) -> None:
    """Checks, before any work, what every layer of a model is to become.

    Raises:
      ValueError: a rule of the recipe has no layer; a method cannot be for its layer; a budget for
        all layers has none to spend on; or row groups of tokens' weights do not divide a layer.
    """
    layers, matrices = linear_layers(settings, config), outer_matrices(config)
    names = [*(layer_name(*layer) for layer in layers), *matrices]
    check_used(settings.recipe, names, routers(settings, config))
    groups = settings.calibration.gradient_groups or 1
    any_open = False
    for layer, shape in layers.items():
        found = layer_format(settings, *layer)
        own = [found.settings] if found.coder else []
        if settings.allocation.bits_per_value and is_open(settings, found.rule):
            own, any_open = choices(settings, found.rule), True
        elif found.coder:
            _check_bytes(found, layer[1], shape)
        check_row_groups({layer[1]: shape}, own, groups)
    for name, found in outer_formats(settings, config).items():
        if found.method == "trellis" and name == EMBEDDING:
            raise ValueError(
                f"config.recipe: {name} cannot have method 'trellis', whose codes run across its "
                "rows, which are looked up; name another method for it in a rule of its own"
            )
        _check_bytes(found, name, matrices[name])
    if settings.allocation.bits_per_value and not any_open:
        raise ValueError(
            f"allocation.bits_per_value={settings.allocation.bits_per_value:g} has no effect: the "
            "rules of config.recipe say the bits of every layer; set it to 0, or leave some open"
        )


def check_given(settings: RunSettings, config: ModelConfig, given: Collection[str]) -> None:
    """Checks that what the command line names reaches a layer that no rule has settled otherwise.

    Args:
      settings: of the run.
      config: of the model.
      given: fields named, such as "vq.bits".

    Raises:
      ValueError: a field does not.
    """
    reasons = settled_fields(settings, config)
    for field in given:
        if field in reasons:
            raise ValueError(f"--config.{field} has no effect {reasons[field]}")


def settled_fields(settings: RunSettings, config: ModelConfig) -> dict[str, str]:
    """{field: why it has no effect} for those that rules settle otherwise for all their layers.

    Args:
      settings: of the run.
      config: of the model.
    """
    if not settings.recipe:
        return {}
    names = [layer_name(*layer) for layer in linear_layers(settings, config)]
    matrices = outer_matrices(config)
    reached = set()
    if not all(rule_of(settings.recipe, name) for name in matrices):
        reached.add("embeddings")
    ruled = {format_of(settings, n) for n in (*names, *matrices) if rule_of(settings.recipe, n)}
    if not all(rule_of(settings.recipe, name) for name in names):
        ruled.add(Format(settings.method, settings.method_settings))
    for found in ruled:
        overrides = dict(found.rule.overrides) if found.rule else {}
        if "method" not in overrides:
            reached.add("method")
        if found.method in METHODS:
            section = METHODS[found.method].section
            fields = (field.name for field in dataclasses.fields(found.settings))
            reached |= {f"{section}.{name}" for name in fields if name not in overrides}
    of_layers = {"method", "embeddings"} | {
        f"{method.section}.{field.name}"
        for method in METHODS.values()
        for field in dataclasses.fields(method.settings)
    }
    reason = (
        "because rules of config.recipe say otherwise for every layer that it is of; leave it out, "
        "or mend the rules"
    )
    return dict.fromkeys(sorted(of_layers - reached), reason)


def _check_bytes(found: Format, name: str, shape: tuple[int, int]) -> None:
    """Raises ValueError where a format cannot be within its own bits."""
    if hasattr(found.settings, "check_budget"):
        try:
            found.settings.check_budget(*shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def of_recipe(settled: int, values: int) -> str:
    """What layers that rules have settled take, for a message; "" where there are none."""
    if not settled:
        return ""
    return f", of which layers that config.recipe settles take {8 * settled / values:.4f}"
