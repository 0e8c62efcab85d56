"""How much each calibration token matters to each layer: squared gradients of the model's loss.

A Hessian mean x x^T counts an error in a layer's outputs the same at every token and in every row.
GuidedQuant (arXiv 2505.07004) weighs token t by (dL/dy_tr)^2, the squared gradient of the loss L
with respect to output r of the layer, an estimate of the diagonal of its Fisher information. A
Hessian per row would be too many, so the squares are averaged over groups of rows. This file
computes those weights; what consumes them builds the weighted Hessians. L is the sum of the
negative log-likelihoods of the next tokens, in nats, of the float model.

The forward pass (forward.py) has saved the inputs of every block; this one goes down through the
blocks, takes the gradient at the exit of each to its entrance, and writes the weights on the way.
Both streams are bfloat16, which has float32's range.

Costs:
  flops: inside each block one forward pass without its last product, and one for the gradients of
    activations; gradients of parameters are never formed. For the curves, 5/8 of 2 C^2 for every
    token and layer with C inputs.
  memory: device: a block, or the embedding and head, and what one batch keeps for its backward
    pass, and the moments. Host: a block, and its token weights, 28 bytes * g per token; with k
    experts a token, 16 + 12 k.
  disk: three streams of n * T * hidden * 2 bytes, beside those of the forward pass; whether there
    is room is checked first (`peak_bytes`). What stays is blocks * 7 * n * T * g * 4 bytes. For
    SmolLM2-135M on 32 x 1024 tokens: 28 MB * g. For Llama-2-7B on 128 x 2048 tokens: 0.23 GB * g.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import lax

from gptvq_jax.console.layer_kind import layer_kind
from gptvq_jax.core.hessian import add_inputs
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import head_chunk
from gptvq_jax.models.llama import DecoderBlock, Params, stage_inputs
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.models.stages import EXPERT_STAGES, expert_of
from gptvq_jax.run import allocation, curves, forward, spread, token_weights
from gptvq_jax.run.activations import file_bytes
from gptvq_jax.run.calibrate import (
    LAST,
    Moments,
    add_routed,
    counted,
    finite,
    init_moments,
    moment_flops,
    on_device,
    window_batches,
)
from gptvq_jax.run.context import Context
from gptvq_jax.run.embedding import head_on_device
from gptvq_jax.run.token_losses import token_nll

STREAM = "gradient"  # of the loss with respect to x, at the points between blocks
_HEADER_BYTES = 512  # of one array in a file of token weights, at most


def peak_bytes(config: ModelConfig, shape: tuple[int, int], num_groups: int) -> int:
    """Most bytes that `Backward` adds to what the forward pass has left on the disk.

    Args:
      config: of the model.
      shape: of the tokens (n, T).
      num_groups: g.
    """
    stream = file_bytes((*shape, config.hidden_size))
    kept = (
        weight_bytes(config.of_block(index), shape, num_groups)
        for index in range(config.num_hidden_layers)
    )
    return 3 * stream + sum(kept)


def weight_bytes(config: ModelConfig, shape: tuple[int, int], num_groups: int) -> int:
    """Of the token weights of a block, at most; `shape` is that of the tokens (n, T)."""
    shapes = token_weights.shapes(config, shape, num_groups).values()
    return sum(4 * math.prod(of) + _HEADER_BYTES for of in shapes)


class Backward:
    """A visitor of the blocks, downwards: token weights and, where asked for, error curves.

    `workdir.load_token_weights(index)` then has them as token_weights.py says, float32. The layers'
    inputs and the token weights meet here, so the Hessians of the curves are summed on the
    way.

    Args:
      context: of the run.
      tokens: calibration windows (n, T).
      num_groups: g, contiguous groups of equal size that the rows of every layer are split into.
      measured: error curves are made of so many blocks, from the first.
      keep_float: whether another pass reads the float model's states later.
    """

    def __init__(
        self,
        context: Context,
        tokens: np.ndarray,
        num_groups: int,
        measured: int,
        keep_float: bool,
    ):
        check_groups(context.source.config, num_groups)
        self._context, self._tokens, self._num_groups = context, tokens, num_groups
        self._measured = measured
        self.files = context.files
        self.releases = (STREAM,) if keep_float else (STREAM, forward.STREAM, forward.MIDDLE)

    def position(self, order: range) -> int:
        """Blocks that have their weights and curves; 0 where the way on from there is lost."""
        done = next((n for n, index in enumerate(order) if not self._has(index)), len(order))
        if 0 < done < len(order) and order[done] + 1 not in self.files.points(STREAM):
            return 0
        return done

    def _has(self, index: int) -> bool:
        workdir = self._context.workdir
        has_curves = index >= self._measured or workdir.has_curves(index)
        return workdir.has_token_weights(index) and has_curves

    def begin(self) -> None:
        """Saves the gradient with respect to the inputs of the head."""
        source, settings, workdir, progress, stopwatch = self._context
        depth = source.config.num_hidden_layers
        if depth in workdir.streams.points(STREAM):
            return
        with stopwatch.stage("gradients"):
            outer = spread.on_all(head_on_device(source.config, source.outer()))
            x = workdir.streams.read(forward.STREAM, depth)
            with workdir.streams.write(STREAM, depth, x.shape) as out:
                for part in window_batches(settings.calibration):
                    own = spread.mine(part)
                    tokens = self._tokens[own]
                    progress.note(f"gradient of the loss, window {part.start} of {len(x)}")
                    stopwatch.flops(flops.head_backward(source.config, *tokens.shape))
                    windows, static = (on_device(x[own]), tokens), (source.config,)
                    dx, _ = spread.run(_head_backward, static, outer, windows, part=part)
                    out[own] = finite(dx, "head: the gradient of the loss")

    def visit(self, index: int, block: Params) -> None:
        """Takes the gradient from a block's exit to its entrance."""
        workdir, stopwatch = self._context.workdir, self._context.stopwatch
        measures = index < self._measured
        with stopwatch.stage("gradients"):
            weights, moments = self._backward(index, block, measures)
        if measures:
            with stopwatch.stage("allocation"):
                fitted = self._context.settings.calibration.num_windows
                of_fitted = {name: weight[:fitted] for name, weight in weights.items()}
                rows = allocation.measure(self._context, index, block, moments, of_fitted)
                workdir.save_curves(index, rows)
        # Last: the block is finished once its weights are there.
        workdir.save_token_weights(index, weights)

    def _backward(self, index: int, block: Params, measures: bool):
        """Writes the gradient; returns token weights and moments."""
        config, c = self._context.source.config.of_block(index), self._context.settings.calibration
        files, groups = self._context.files, self._num_groups
        x, gradient = files.read(forward.STREAM, index), files.read(STREAM, index + 1)
        weights = {
            name: np.zeros(shape, np.int32 if name == token_weights.ROUTES else np.float32)
            for name, shape in token_weights.shapes(config, x.shape[:2], groups).items()
        }
        # Where the layers are quantized without weights, their curves are measured without.
        of_tokens = weights if c.gradient_groups else None
        stages = range(LAST) if measures else ()
        moments = init_moments(config, block, stages, of_tokens, products=c.products)
        moments = spread.partial_sums(moments)
        fitted = c.num_windows, x.shape[1]
        sampled = curves.num_windows(self._context.settings, config, fitted)
        with files.write(STREAM, index, x.shape) as out:
            power = c.gradient_power if c.gradient_groups else 0.0
            block = spread.on_all(block)
            for part in window_batches(c):
                counts, own = part.start < sampled, spread.mine(part)
                windows = on_device(x[own]), on_device(gradient[own]), spread.real(part)
                shared = block, power, counts
                (dx, of_batch), moments = spread.run(
                    _block_backward, (config, groups), shared, windows, moments, part=part
                )
                self._context.stopwatch.flops(_backward_flops(config, moments, dx.shape, counts))
                out[own] = finite(dx, f"block {index}: the gradient of the loss")
                for name, weight in weights.items():
                    what = f"block {index}: the squared gradient of {name}"
                    weight[own] = finite(of_batch[name], what)
        weights = {name: spread.joined(weight) for name, weight in weights.items()}
        return weights, spread.total(moments)


def _block_backward(static, shared, windows, moments):
    (config, groups), (block, power, counts), (x, dy, real) = static, shared, windows
    of_block = groups, moments, power, counts, real
    *made, moments = block_backward(config, block, x, dy, *of_block)
    return tuple(made), moments


def _head_backward(static, outer, windows, sums):
    return head_backward(*static, outer, *windows), sums


def _backward_flops(config: ModelConfig, moments: Moments, shape: tuple[int, ...], counts) -> int:
    """Of `block_backward` on x (batch, T, hidden)."""
    added = math.prod(shape[:2]) if counts else 0
    return flops.block_backward(config, *shape[:2]) + moment_flops(config, moments, added)


@partial(jax.jit, static_argnames=("config", "num_groups"), donate_argnames="moments")
def block_backward(
    config: ModelConfig,
    block: Params,
    x: jax.Array,
    dy: jax.Array,
    num_groups: int,
    moments: Moments = Moments({}, {}),  # noqa: B008 - empty, and never changed
    power: float = 1.0,
    counts: bool = True,
    real: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], Moments]:
    """Takes the gradient of the loss through one block and weighs the tokens of its layers.

    Args:
      config: of the model.
      block: parameters.
      x: inputs of the block (batch, T, hidden).
      dy: gradient with respect to its outputs, in the shape and dtype of x.
      num_groups: g, contiguous groups of equal size that the rows of every layer are split into.
      moments: those wanted of what the layers read, by owner (layer, row group).
      power: of the weights, with which tokens count there; 0: all alike, or those of an expert by
        its squared router weights.
      counts: whether these tokens are added to the moments, which are as they were otherwise.
      real: (batch,) 1, or 0 for windows that count nowhere; None: all count.

    Returns:
      The gradient with respect to x, and token weights (batch, T, g), as token_weights.py has them:
      element (b, t, k) of a layer is the mean over the rows r of group k of (dL/dy_r)^2 at token t;
      and the moments.

    Raises:
      ValueError: the rows of a layer do not split into g groups.
    """
    check_groups(config, num_groups)
    slots = config.experts_per_token
    outputs = {}
    for name, rows in _layer_rows(config).items():
        shape = x.shape[:2] if expert_of(name) is None else (*x.shape[:2], slots)
        outputs[f"{layer_kind(name)}/outputs"] = jnp.zeros((*shape, rows), x.dtype)

    def run(x, perturbations):
        variables = {"params": block, "perturbations": unflatten_dict(perturbations, sep="/")}
        y, state = DecoderBlock(config).apply(variables, x, mutable=["intermediates"])
        return y, state["intermediates"]

    _, backward, read = jax.vjp(run, x, outputs, has_aux=True)
    dx, gradients = backward(dy)

    def group_means(gradient):
        squares = jnp.square(gradient.astype(jnp.float32))
        return jnp.mean(squares.reshape(*squares.shape[:-1], num_groups, -1), axis=-1)

    weights = {
        name.removesuffix("/outputs"): group_means(gradient) for name, gradient in gradients.items()
    }

    def weight_of(kind, k):
        return jnp.power(weights[kind][..., k], power)

    def of_slots(kind, k):
        squares = jnp.square(routed.routes.weights)
        return jnp.where(power > 0, weight_of(kind, k), squares)

    def added(moments):
        for stage in EXPERT_STAGES if config.experts else ():
            moments = add_routed(config, stage, by_stage[stage], moments, of_slots, real=real)
        inputs = {
            (name, k): moment
            if (name, k) in moments.tokens
            else add_inputs(moment, by_stage[stage_of[name]], counted(weight_of(name, k), x, real))
            for (name, k), moment in moments.inputs.items()
        }
        return moments._replace(inputs=inputs)

    stage_of = config.layers.stage_of
    by_stage = [stage_inputs(config, read, stage) for stage in range(LAST)]
    if config.experts:
        routed = by_stage[LAST - 1]
        weights[token_weights.ROUTES] = routed.routes.experts
    return dx, weights, lax.cond(counts, added, lambda moments: moments, moments)


@partial(jax.jit, static_argnames="config")
def head_backward(config: ModelConfig, outer: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Gradient of the sum of `token_nll` with respect to the outputs of the last block.

    Each chunk of tokens goes forward and backward before the next one starts. Differentiating the
    loop inside `token_nll` instead would keep the logits of all tokens.

    Args:
      config: of the model.
      outer: its tree without blocks.
      x: outputs of the last block (batch, T, hidden).
      tokens: (batch, T).

    Returns:
      (batch, T, hidden) in the dtype of x; 0 at the last token, after which nothing is predicted.
    """
    time, size = x.shape[1], head_chunk(config, len(x))
    # The last token of a chunk is only a target, and the first token of the next one.
    pad = -(time - 1) % size
    padded_x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
    padded_tokens = jnp.pad(tokens, ((0, 0), (0, pad)))

    def chunk(start):
        part, targets = (
            lax.dynamic_slice_in_dim(a, start, size + 1, axis=1) for a in (padded_x, padded_tokens)
        )
        dx = jax.grad(lambda part: jnp.sum(token_nll(config, outer, part, targets)))(part)
        return dx[:, :-1]

    dx = lax.map(chunk, jnp.arange(0, time - 1, size))
    dx = jnp.moveaxis(dx, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, : time - 1]
    return jnp.pad(dx, ((0, 0), (0, 1), (0, 0)))


def check_groups(config: ModelConfig, num_groups: int) -> None:
    """Checks that the output rows of every layer split into groups of equal size.

    Raises:
      ValueError: those of a layer do not.
    """
    rows = {n: count for block in config.block_counts() for n, count in _layer_rows(block).items()}
    for name, count in rows.items():
        if num_groups < 1 or count % num_groups:
            raise ValueError(
                f"calibration.gradient_groups={num_groups} does not divide the {count} rows of "
                f"{name}; choose a divisor of {math.gcd(*rows.values())}"
            )


def _layer_rows(config: ModelConfig) -> dict[str, int]:
    return {name: rows for name, (rows, _) in layer_shapes(config).items()}
