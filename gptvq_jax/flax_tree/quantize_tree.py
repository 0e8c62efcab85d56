"""Quantizes the layers of a Flax model that rules choose, on batches that it is calibrated on."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from gptvq_jax.console.progress import Progress
from gptvq_jax.core.hessian import Moment, factorize, mean
from gptvq_jax.core.quantized_tensor import QuantizedTensor, dequantize_compiled
from gptvq_jax.core.seeds import random_key
from gptvq_jax.flax_tree.calibrate import Calibration, Moments
from gptvq_jax.flax_tree.kernel import PackedKernel, is_packed
from gptvq_jax.flax_tree.layers import Found, Layer
from gptvq_jax.flax_tree.models import as_function, variables_of
from gptvq_jax.flax_tree.rules import assign, format_of, parse
from gptvq_jax.methods.layer import Objective, Problem, quantize_layers, relative_error
from gptvq_jax.methods.pool import num_workers, parallel
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.rule_settings import Format
from gptvq_jax.rules import DENSE, Rule

INPUTS = ("float", "quantized")


def quantize_tree(
    model: Any,
    calibration: Iterable[Any],
    rules: Sequence[tuple[str, Any]],
    *,
    params: Any = None,
    inputs: str = "float",
    damping: float = 0.01,
    seed: int = 0,
) -> Any:
    """The variables of a model with packed kernels where rules say so; run by `packed`.

    A layer is a kernel, of two axes or more, that nothing but products reads: `dot_general` and
    what becomes one, `einsum`, `Dense`, attention, and convolutions. It is found in the model's
    program, so it may be of any module, shared or stacked by nn.scan and nn.vmap. Its Hessian is
    the mean of x x^T over all rows x that its products read; of the batches one at a time is in
    memory.

    Args:
      model: a Linen module, an NNX module, or a function of (variables, *inputs) that jax.jit
        could take, which has in it what else a model is given, as `train=False`.
      calibration: batches, each the model's input or a tuple of its inputs, arrays; some hundred
        to thousand rows for each layer.
      rules: pairs (regular expression, settings); the first one that fits the whole name of a
        layer counts, and a layer that none fits stays. A name is the path of its module, such as
        "block_0/mlp/Dense_0", and that of the parameter where it is not "kernel". Settings are
        {"method": "gptvq", "dim": 2, "bits": 3}, fields of the method's section of a config, or as
        text a method, "dense", or "int8" for rows of 8 bits.
      params: what the model takes first, such as {"params": ...}; of an NNX module: None.
      inputs: "float": a layer's inputs are those of the float model. "quantized": those of the
        model whose earlier layers are quantized; the batches are gone through once for each group
        of layers that read one array.
      damping: added to the diagonal of a Hessian, as a fraction of its mean.
      seed: of the codebook seeds.

    Returns:
      A tree of the same structure; of an NNX module, its `nnx.state`.

    Raises:
      ValueError: a rule that is not used or no rule, a batch that the model does not take, a layer
        that saw no input, settings that a layer cannot have; the message names it and the fix.
    """
    parsed = parse(rules)
    if inputs not in INPUTS:
        raise ValueError(f"inputs={inputs!r} must be one of {', '.join(INPUTS)}")
    if isinstance(damping, str) or not 0 <= damping <= 1:
        raise ValueError(f"damping={damping!r} must be a number from 0 to 1")
    if not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} must be an integer")
    key = random_key(seed)
    tree = variables_of(model, params)
    if any(map(is_packed, jax.tree.leaves(tree, is_leaf=is_packed))):
        raise ValueError("the tree is quantized already; quantize the float one, by all rules")
    work = Calibration(as_function(model), tree, calibration)
    if inputs == "quantized" and not work.again:
        raise ValueError(
            "inputs='quantized' goes through the batches several times; pass a list of them, or "
            "inputs='float' with a generator"
        )
    batches = work.batches()
    first = next(batches)
    found = work.find(tree, first)
    taken = _taken(parsed, found)
    if not taken:
        return tree
    layers = {name: found.layers[name] for name in taken}
    groups = sorted({layer.group for layer in layers.values()})
    turns = len(groups) if inputs == "quantized" else 1
    steps = sum(layer.layout.count for layer in layers.values())
    steps += turns * (work.count or 0)
    with Progress(steps, "quantizing", "step") as progress:
        on_batch = progress.advance if work.count else partial(progress.note, "batches")
        job = partial(_quantize, taken=taken, damping=damping, key=key, progress=progress)
        if inputs == "float":
            sums = work.moments(tree, layers, first, batches, None, on_batch)
            return job(tree, tree, layers, sums)[0]
        made = dense = tree
        for group in groups:
            of_group = {n: layer for n, layer in layers.items() if layer.group == group}
            batches = work.batches()
            first = next(batches)
            # Of all layers, so that one program serves all groups.
            sums = work.moments(dense, layers, first, batches, group, on_batch)
            made, dense = job(made, dense, of_group, sums)
        return made


def _taken(rules: Sequence[Rule], found: Found) -> dict[str, Format]:
    """What the layers become that are to be quantized."""
    taken = assign(rules, [*found.layers, *found.unread], found.passed_over)
    for name in found.unread:
        if name in taken and taken[name].method != DENSE:
            raise ValueError(
                f"{name} sees no input: the model reads it nowhere on this batch; calibrate with a "
                f"function that does, or put a rule for it, ({name!r}, 'dense'), first"
            )
    for name, why in found.passed_over.items():
        wanted = format_of(rules, name)
        if wanted is not None and wanted.method != DENSE:
            say = logging.warning if name in found.multiplied else logging.info
            say("%s stays dense: %s", name, why)
    return {name: wanted for name, wanted in taken.items() if wanted.method != DENSE}


def _quantize(
    made: Any,
    dense: Any,
    layers: Mapping[str, Layer],
    sums: Moments,
    *,
    taken: Mapping[str, Format],
    damping: float,
    key: jax.Array,
    progress: Progress,
) -> tuple[Any, Any]:
    """Both trees, with these layers packed and as they then are."""
    leaves, structure = jax.tree.flatten(made, is_leaf=is_packed)
    dense_leaves = jax.tree.leaves(dense)
    jobs = [(layer, i) for layer in layers.values() for i in range(layer.layout.count)]

    def problem(job: tuple[Layer, int]) -> Problem:
        layer, index = job
        kernel = jnp.asarray(dense_leaves[layer.place], jnp.float32)
        name = layer.name if layer.layout.count == 1 else f"{layer.name}[{index}]"
        wanted, place = taken[layer.name], jax.random.fold_in(key, layer.place)
        return Problem(
            METHODS[wanted.method].quantize,
            wanted.settings,
            layer.layout.matrices(kernel)[index],
            [_objective(sums[layer.name][index], damping, name)],
            jax.random.fold_in(place, index),
            name=name,
        )

    tensors = {name: [] for name in layers}
    for start in range(0, len(jobs), num_workers()):  # as many Hessians are factorized at once
        chunk = jobs[start : start + num_workers()]
        problems = parallel(problem, chunk)
        for (layer, _), solved, tensor in zip(
            chunk, problems, quantize_layers(problems), strict=True
        ):
            tensors[layer.name].append(tensor)
            _say(solved, tensor)
            progress.advance(solved.name)
    for name, (_, place, layout, _) in layers.items():
        kernel = PackedKernel(tuple(tensors[name]), layout, dense_leaves[place].dtype)
        leaves[place] = kernel
        matrices = jnp.stack([dequantize_compiled(tensor) for tensor in tensors[name]])
        dense_leaves[place] = layout.kernel(matrices).astype(kernel.dtype)
    dense = jax.tree.unflatten(jax.tree.structure(dense), dense_leaves)
    return jax.tree.unflatten(structure, leaves), dense


def _objective(moment: Moment, damping: float, name: str) -> Objective:
    hessian = mean(moment)
    if float(jnp.max(jnp.diagonal(hessian))) == 0:
        raise ValueError(
            f"{name} sees no input but zeros on the calibration batches; pass others, or put a "
            "rule that leaves it 'dense' first"
        )
    return Objective(hessian, factorize(hessian, damping, name))


def _say(problem: Problem, tensor: QuantizedTensor) -> None:
    if logging.get_verbosity() < logging.INFO:
        return  # nobody listens: the error costs a product
    error = relative_error(problem.weight, dequantize_compiled(tensor), problem.objectives)
    logging.info(
        "%s: %.3f bits per value, relative error of outputs %.4g",
        problem.name,
        tensor.bits_per_value,
        error,
    )
