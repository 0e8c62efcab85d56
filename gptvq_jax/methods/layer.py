"""One linear layer under what its calibration found: from weight to packed tensor.

Rows whose outputs matter at different tokens may have Hessians of their own (GuidedQuant, arXiv
2505.07004): the layer is then cut into groups of rows, each quantized as a layer by itself.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from gptvq_jax.core import flops, metrics
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.hessian import Factor, asymmetric_target, zero_dead
from gptvq_jax.core.mesh import work_mesh
from gptvq_jax.core.products import FLOAT32
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.vq_tensor import FactoredCodebook, VQTensor, concat_rows
from gptvq_jax.methods.pool import parallel


class Objective(NamedTuple):
    """What a group of rows minimises."""

    hessian: jax.Array  # (C, C) mean y y^T over the inputs y that the layer will get, in any unit
    factor: Factor  # of that Hessian
    shift: jax.Array | None = None  # (R, C) S of `asymmetric_target`; None: symmetric
    judge: jax.Array | None = None  # (C, C) likewise over inputs that nothing is fitted to


class Problem(NamedTuple):
    """A layer, and how it is to be quantized."""

    quantize: Callable[..., QuantizedTensor] | None  # of a method; None: it stays dense
    settings: Any  # of that method, hashable
    weight: jax.Array  # (R, C)
    objectives: Sequence[Objective]  # of g contiguous groups of R / g rows
    key: jax.Array  # random, of the seeding
    asymmetry: float = 0.0  # strength of `asymmetric_target`, for objectives that have a shift
    name: str = "layer"  # for messages
    part_grid: GroupGrid | None = None  # of each group of rows, where they are a sample of a layer
    products: str = FLOAT32  # of `asymmetric_target`


def quantize_layers(problems: Sequence[Problem]) -> list[QuantizedTensor]:
    """Quantizes weights, several at once where the device is a CPU of several cores.

    On several devices (core/mesh.py) the rows of each are spread over all of them. The results do
    not depend on the unit of an objective, nor on how many run at once; on how many devices there
    are only by the last bits of what is summed over rows (methods/devices.py).

    Raises:
      ValueError: a weight is too large for the format, or a result is not finite.
    """
    mesh = work_mesh()
    # A sample of a layer's rows is one of a CPU's parts: several devices have nothing to share.
    sampled = any(problem.part_grid is not None for problem in problems)
    alone = mesh.size == 1 or sampled and _on_cpu()
    targets = parallel(_targets, problems)
    cut = _parts if alone else partial(_on_devices, mesh)
    parts = [
        [partial(_named, problem.name, part) for part in cut(problem, of_layer)]
        for problem, of_layer in zip(problems, targets, strict=True)
    ]
    work = list(itertools.chain(*parts))
    # In a program of several devices these wait for each other: two at once might for ever.
    tensors = iter(parallel(_call, work) if alone else map(_call, work))
    done = []
    for problem, of_layer, own in zip(problems, targets, parts, strict=True):
        made = [next(tensors) for _ in own]
        tensor = concat_rows(made) if len(made) > 1 else made[0]
        peak = max(float(jnp.max(jnp.abs(target))) for target in of_layer)
        _check_range(tensor, peak, problem.name)
        if text := note(problem, tensor):
            logging.warning("%s %s", problem.name, text)
        done.append(tensor)
    return done


def note(problem: Problem, tensor: QuantizedTensor) -> str | None:
    """What the method has to say of a layer, as the rest of a sentence; None: nothing."""
    of_method = getattr(problem.settings, "note", None)
    return of_method(tensor) if of_method else None


def most_flops(problem: Problem) -> int:
    """Of the matrix products of `quantize_layers` for one of them, Hessians factorized already."""
    groups = len(problem.objectives)
    rows, cols = problem.weight.shape
    size = groups * problem.settings.flops(rows // groups, cols)
    if problem.objectives[0].shift is not None:
        size += 3 * flops.unit(rows, cols)  # to make it, and two to solve for the target
    return size


def quantize_layer(*problem, **fields) -> QuantizedTensor:
    """`quantize_layers` of one Problem, given by its fields."""
    return quantize_layers([Problem(*problem, **fields)])[0]


def _targets(problem: Problem) -> list[jax.Array]:
    """What the rows of each group are to come close to."""
    targets = []
    groups = row_groups(problem.weight, len(problem.objectives))
    for part, of_part in zip(groups, problem.objectives, strict=True):
        hessian, hinv_chol = of_part.hessian, of_part.factor.hinv_chol
        if of_part.shift is not None:
            of_target = hinv_chol, problem.asymmetry, problem.products
            part = asymmetric_target(part, hessian, of_part.shift, *of_target)
        targets.append(zero_dead(part, hessian))
    return targets


def _parts(
    problem: Problem, targets: Sequence[jax.Array]
) -> Iterator[Callable[[], QuantizedTensor]]:
    """Rows that share no codebook with others are quantized by themselves."""
    split = getattr(problem.settings, "parts", None) if _on_cpu() else None
    judged = getattr(problem.settings, "judged", False)
    for target, objective in zip(targets, problem.objectives, strict=True):
        hinv_chol = objective.factor.hinv_chol
        arguments = (objective.hessian, hinv_chol, problem.key, problem.settings)
        if problem.part_grid is not None:
            yield partial(problem.quantize, target, *arguments, grid=problem.part_grid)
            continue
        quantize = problem.quantize
        if judged:
            quantize = partial(quantize, judge=objective.judge)
        if split is None:
            yield partial(quantize, target, *arguments)
            continue
        grid, first_rows = split(*target.shape)
        for row in first_rows:
            rows = target[row : row + grid.rows]
            first_strip = row // grid.strip_rows
            yield partial(quantize, rows, *arguments, grid=grid, first_strip=first_strip)


def _on_devices(
    mesh: Mesh, problem: Problem, targets: Sequence[jax.Array]
) -> Iterator[Callable[[], QuantizedTensor]]:
    """The rows of each group, over the devices; a CPU's parts are those of one device."""
    is_cut = getattr(problem.settings, "is_cut", None) if _on_cpu() else None
    for target, objective in zip(targets, problem.objectives, strict=True):
        hinv_chol = objective.factor.hinv_chol
        arguments = target, objective.hessian, hinv_chol, problem.key, problem.settings
        options = {"mesh": mesh}
        if getattr(problem.settings, "judged", False):
            options["judge"] = objective.judge
        if problem.part_grid is not None:
            options["grid"] = problem.part_grid
        elif is_cut is not None and is_cut(*target.shape):
            options["parts"] = problem.settings.parts(*target.shape)
        yield partial(_collected, partial(problem.quantize, *arguments, **options))


def _collected(part: Callable[[], QuantizedTensor]) -> QuantizedTensor:
    """A part whose arrays belong to no device, lest those of others do not go with them."""
    return jax.tree.map(jnp.asarray, jax.device_get(part()))


def _call(part: Callable[[], QuantizedTensor]) -> QuantizedTensor:
    return part()


def _named(name: str, part: Callable[[], QuantizedTensor]) -> QuantizedTensor:
    """The part, or what is wrong with it and of which layer it is."""
    try:
        return part()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _on_cpu() -> bool:
    """An accelerator wants a whole layer at once; its cores share it."""
    return jax.default_backend() == "cpu"


_TOO_LARGE = float(np.finfo(np.float16).max) / 2  # feedback may double a weight
_TOO_SMALL = 2.0**-19  # float16 numbers are 2^-24 apart there
_SQUARES = 1e15  # beyond it, and below its inverse, sums of squares leave float32


def _check_range(tensor: QuantizedTensor, peak: float, name: str) -> None:
    """Says where weights of up to `peak` are what no float16 codebook or scale can hold.

    Raises:
      ValueError: they are too large, or a stored number is not finite.
    """
    own_exponents = isinstance(tensor, VQTensor) and tensor.block_scales is not None
    smallest = 1 / _SQUARES if own_exponents else _TOO_SMALL
    book = getattr(tensor, "codebook", None)
    if isinstance(book, FactoredCodebook) and book.left_scale is not None:
        smallest = _TOO_SMALL**2  # a product of two stored numbers
    stored = [leaf for leaf in jax.tree.leaves(tensor) if leaf.dtype == jnp.float16]
    finite = all(np.isfinite(np.asarray(leaf)).all() for leaf in stored)
    if peak > _SQUARES or not finite and not own_exponents and peak > _TOO_LARGE:
        raise ValueError(f"{name} holds {peak:.3g}, too large for {_ADVICE}")
    if not finite:
        raise ValueError(f"{name}: the quantized weight is not finite; raise config.damping")
    if 0 < peak < smallest:
        logging.warning("%s holds at most %.3g, too small for %s", name, peak, _ADVICE)


_ADVICE = (
    "float16, in which codebooks and scales are stored whatever dense_dtype is; use "
    "method='gptvq' with vq.scale_block_size=16, for 1e-15 to 1e15, or leave the block dense "
    "(num_blocks, with dense_dtype='bfloat16')"
)


def losses(weight: jax.Array, quantized: jax.Array, objectives: Sequence[Objective]) -> list[float]:
    """L(Q) of every group of rows; weight and quantized are (R, C)."""
    groups = len(objectives)
    parts = zip(row_groups(weight, groups), row_groups(quantized, groups), objectives, strict=True)
    return [metrics.loss_of_any_size(w, q, objective.hessian) for w, q, objective in parts]


def relative_error(
    weight: jax.Array, quantized: jax.Array, objectives: Sequence[Objective]
) -> float:
    """L(Q) / L(0), summed over the groups of rows; 0 where the layer's output is 0."""
    signal = sum(losses(weight, jnp.zeros_like(weight), objectives))
    return sum(losses(weight, quantized, objectives)) / (signal if signal > 0 else 1.0)


def check_row_groups(
    shapes: Mapping[str, tuple[int, int]], settings: Iterable[Any], groups: int
) -> None:
    """Checks, before any work, that quantized groups of rows can be stacked again.

    Args:
      shapes: {layer: (R, C)}, R a multiple of `groups`.
      settings: of the method, every one that a layer may get.
      groups: g.

    Raises:
      ValueError: the rows of a group are not whole row strips.
    """
    if groups == 1:
        return
    for name, (rows, cols) in shapes.items():
        for of_layer in settings:
            grid = of_layer.grid(rows // groups, cols)
            if grid.rows % grid.strip_rows:
                raise ValueError(
                    f"calibration.gradient_groups={groups}: the {grid.rows} rows of a group of "
                    f"{name} are not whole strips of {grid.strip_rows} rows; choose another "
                    "number of groups or vq.group_size"
                )


def row_groups(weight: jax.Array, groups: int) -> list[jax.Array]:
    """A weight (R, C) as `groups` contiguous parts of equal height."""
    return jnp.split(weight, groups)
