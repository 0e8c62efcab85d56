"""How much each calibration token matters to each layer: squared gradients of the model's loss.

A Hessian mean x x^T counts an error in a layer's outputs the same at every token and in every row.
GuidedQuant (arXiv 2505.07004) weighs token t by (dL/dy_tr)^2, the squared gradient of the loss L
with respect to output r of the layer, an estimate of the diagonal of its Fisher information. A
Hessian per row would be too many, so the squares are averaged over groups of rows. This file
computes those weights; what consumes them builds the weighted Hessians. L is the sum of the
negative log-likelihoods of the next tokens, in nats, of the float model.

The model streams through a block at a time, forward and then backward. Forward saves the inputs of
every block; backward takes the gradient at the exit of a block to its entrance, and writes the
weights on the way. Both streams are bfloat16, which has float32's range.

Costs:
  flops: about three forward passes: one forward, one again inside each block on the way back, and
    one for the gradients of activations. Gradients of parameters are never formed.
  memory: device: a block, or the embedding and head, and what one batch keeps for its backward
    pass. Host: a block, and its token weights, 28 bytes * g per token.
  disk: (blocks + 2) * n * T * hidden * 2 bytes at the peak, all gone at the end; it grows with
    depth, and whether there is room is checked first (`peak_bytes`). What stays is
    blocks * 7 * n * T * g * 4 bytes. For SmolLM2-135M on 32 x 1024 tokens: 1.2 GB, then 28 MB * g.
    For Llama-2-7B on 128 x 2048 tokens: 73 GB, then 0.23 GB * g.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import lax

from gptvq_jax.console.progress import Progress
from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import HEAD_CHUNK, LINEAR_LAYERS, DecoderBlock, Params, block_forward
from gptvq_jax.models.source import ModelSource, layer_shapes
from gptvq_jax.run.activations import num_bytes
from gptvq_jax.run.calibrate import batches, on_device
from gptvq_jax.run.embedding import head_on_device, write_embeddings
from gptvq_jax.run.evaluate import token_nll
from gptvq_jax.run.workdir import WorkDir

_HEADER_BYTES = 512  # of one array in a file, at most


def steps(config: ModelConfig) -> int:
    """By how much `save_token_weights` advances the progress."""
    return 2 * config.num_hidden_layers


def peak_bytes(config: ModelConfig, shape: tuple[int, int], num_groups: int, done: int) -> int:
    """Most bytes that `save_token_weights` has on the disk at once, in the files that it makes.

    Args:
      config: of the model.
      shape: of the tokens (n, T).
      num_groups: g.
      done: the blocks from here on have their weights already; the depth of the model: none has.
    """
    depth = config.num_hidden_layers
    stream = num_bytes((*shape, config.hidden_size)) + _HEADER_BYTES
    weights = len(LINEAR_LAYERS) * (math.prod(shape) * num_groups * 4 + _HEADER_BYTES)
    # While block i goes backward there are the inputs of blocks 0 to i, the gradients at its exit
    # and at its entrance, and the weights from i on: most for the first block or the last.
    during = [(i + 3) * stream + (depth - i) * weights for i in (0, done - 1) if done]
    return max([depth * weights, *during])


def save_token_weights(
    source: ModelSource,
    tokens: np.ndarray,
    batch_size: int,
    num_groups: int,
    workdir: WorkDir,
    progress: Progress,
    stopwatch: Stopwatch,
) -> None:
    """Writes the token weights of every block to the work directory, resuming where it can.

    `workdir.load_token_weights(index)` then has {name of LINEAR_LAYERS: (n, T, g) float32}. A block
    that an earlier call finished, forward or backward, is not computed again; the files are the
    same to the last bit.

    Args:
      source: the float model.
      tokens: calibration windows (n, T).
      batch_size: most windows per pass.
      num_groups: g, contiguous groups of equal size that the rows of every layer are split into.
      workdir: opened for these tokens and this g.
      progress: advanced by one per block forward and one per block backward, `steps` in all.
      stopwatch: receives the seconds as stage "gradients".

    Raises:
      ValueError: the rows of a layer do not split into g groups, an activation, gradient or weight
        is not finite (nothing of that block is written then), or a file that is needed to go on
        is missing or damaged.
      FullDiskError: the disk lacks the room; said before anything is computed.
    """
    check_groups(source.config, num_groups)
    with stopwatch.stage("gradients"):
        depth = source.config.num_hidden_layers
        done = depth  # the blocks from here on have their weights
        while done and workdir.has_token_weights(done - 1):
            done -= 1
        goes_on = done < depth or workdir.has_activations(depth, "gradient")
        if goes_on:
            workdir.drop_backward(done)  # what a run that was killed has left
        if done:
            most = peak_bytes(source.config, tokens.shape, num_groups, done)
            workdir.check_room(most, "gradients/*")
        if goes_on:
            progress.skip(2 * depth - done)
        else:
            _go_forward(source, tokens, batch_size, workdir, progress)
            progress.note("gradient of the loss")
            _start_backward(source, tokens, batch_size, workdir)
            workdir.drop_backward(done)
        for index in reversed(range(done)):
            _go_backward(source, index, batch_size, num_groups, workdir)
            workdir.drop_backward(index)
            progress.advance(f"block {index} gradients")


def _go_forward(source, tokens, batch_size, workdir, progress) -> None:
    """Saves the inputs of every block, and as those of block `depth` the inputs of the head."""
    depth = source.config.num_hidden_layers
    start = max((i for i in range(depth + 1) if workdir.has_activations(i, "inputs")), default=None)
    if start is None:
        start = 0
        shape = (*tokens.shape, source.config.hidden_size)
        with workdir.write_activations(0, shape, "inputs") as out:
            write_embeddings(source.outer(), tokens, out)
    progress.skip(start)
    for index in range(start, depth):
        block = source.block(index)
        x = workdir.load_activations(index, "inputs")
        with workdir.write_activations(index + 1, x.shape, "inputs") as out:
            for part in batches(len(x), batch_size):
                y = block_forward(source.config, block, on_device(x[part]))
                out[part] = _finite(y, f"block {index}: an activation")
        progress.advance(f"block {index} forward")


def _start_backward(source, tokens, batch_size, workdir) -> None:
    """Saves the gradient with respect to the inputs of the head."""
    depth = source.config.num_hidden_layers
    outer = head_on_device(source.config, source.outer())
    x = workdir.load_activations(depth, "inputs")
    with workdir.write_activations(depth, x.shape, "gradient") as out:
        for part in batches(len(x), batch_size):
            dx = head_backward(source.config, outer, on_device(x[part]), tokens[part])
            out[part] = _finite(dx, "head: the gradient of the loss")


def _go_backward(source, index, batch_size, num_groups, workdir) -> None:
    """Takes the gradient from a block's exit to its entrance, saving the block's token weights."""
    block = source.block(index)
    x = workdir.load_activations(index, "inputs")
    gradient = workdir.load_activations(index + 1, "gradient")
    weights = {n: np.empty((*x.shape[:2], num_groups), np.float32) for n in LINEAR_LAYERS}
    with workdir.write_activations(index, x.shape, "gradient") as out:
        for part in batches(len(x), batch_size):
            dx, of_batch = block_backward(
                source.config, block, on_device(x[part]), on_device(gradient[part]), num_groups
            )
            out[part] = _finite(dx, f"block {index}: the gradient of the loss")
            for name, weight in weights.items():
                what = f"block {index}: the squared gradient of {name}"
                weight[part] = _finite(of_batch[name], what)
    # Last: the block is finished once its weights are there.
    workdir.save_token_weights(index, weights)


@partial(jax.jit, static_argnames=("config", "num_groups"))
def block_backward(
    config: ModelConfig, block: Params, x: jax.Array, dy: jax.Array, num_groups: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Takes the gradient of the loss through one block and weighs the tokens of its layers.

    Args:
      config: of the model.
      block: parameters.
      x: inputs of the block (batch, T, hidden).
      dy: gradient with respect to its outputs, in the shape and dtype of x.
      num_groups: g, contiguous groups of equal size that the rows of every layer are split into.

    Returns:
      The gradient with respect to x, and {name of LINEAR_LAYERS: (batch, T, g) float32}, where
      element (b, t, k) is the mean over the rows r of group k of (dL/dy_r)^2 at token t.

    Raises:
      ValueError: the rows of a layer do not split into g groups.
    """
    check_groups(config, num_groups)
    outputs = {
        f"{name}/outputs": jnp.zeros((*x.shape[:2], rows), x.dtype)
        for name, rows in _layer_rows(config).items()
    }

    def forward(x, perturbations):
        variables = {"params": block, "perturbations": unflatten_dict(perturbations, sep="/")}
        return DecoderBlock(config).apply(variables, x)

    _, backward = jax.vjp(forward, x, outputs)
    dx, gradients = backward(dy)

    def group_means(gradient):
        squares = jnp.square(gradient.astype(jnp.float32))
        return jnp.mean(squares.reshape(*squares.shape[:2], num_groups, -1), axis=-1)

    return dx, {name: group_means(gradients[f"{name}/outputs"]) for name in LINEAR_LAYERS}


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
    time = x.shape[1]
    # The last token of a chunk is only a target, and the first token of the next one.
    pad = -(time - 1) % HEAD_CHUNK
    padded_x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
    padded_tokens = jnp.pad(tokens, ((0, 0), (0, pad)))

    def chunk(start):
        part, targets = (
            lax.dynamic_slice_in_dim(a, start, HEAD_CHUNK + 1, axis=1)
            for a in (padded_x, padded_tokens)
        )
        dx = jax.grad(lambda part: jnp.sum(token_nll(config, outer, part, targets)))(part)
        return dx[:, :-1]

    dx = lax.map(chunk, jnp.arange(0, time - 1, HEAD_CHUNK))
    dx = jnp.moveaxis(dx, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, : time - 1]
    return jnp.pad(dx, ((0, 0), (0, 1), (0, 0)))


def check_groups(config: ModelConfig, num_groups: int) -> None:
    """Checks that the output rows of every layer split into groups of equal size.

    Raises:
      ValueError: those of a layer do not.
    """
    rows = _layer_rows(config)
    for name, count in rows.items():
        if num_groups < 1 or count % num_groups:
            raise ValueError(
                f"calibration.gradient_groups={num_groups} does not divide the {count} rows of "
                f"{name}; choose a divisor of {math.gcd(*rows.values())}"
            )


def _layer_rows(config: ModelConfig) -> dict[str, int]:
    return {name: rows for name, (rows, _) in layer_shapes(config).items()}


def _finite(array: jax.Array, what: str) -> np.ndarray:
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{what} is not finite; check the model's weights and the calibration text, "
            "or set calibration.gradient_groups=0"
        )
    return array
