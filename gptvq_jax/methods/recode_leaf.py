"""Codes of a stored weight chosen again by a gradient, where it pulls hardest (PV-tuning).

PV-tuning (arXiv 2405.14852, section 3.2) moves a continuous copy of the weight along the gradient
of the model's loss, and codes again the few vectors whose copy has moved furthest: a small step in
all of them would be rounded away. Here the copy lives as long as one gradient does, for a layer at
a time, so that no dense copy of the model is kept: the copy is that of a fresh gradient G of some
batches, not one which has grown since the last time.

With a metric H the change of the weight Q is the one that minimises

    2 eta <G, change> + change H change^T,

which is what coordinate descent over codes (moves/recode.py, moves/recode_streams.py) minimises
given the image -eta G. H = mean x x^T of the inputs is the metric of the layer's own outputs; the
identity is that of the paper, in which every vector goes to the centroid nearest to Q - eta G. The
move of a vector P is eta |G_P|, in units of the metric: eta (G_P H_PP^-1 G_P^T)^1/2. eta makes the
root mean square of the moves of those that are chosen `rate` times that of all vectors of the
layer. A gradient says what a small change does: of the new codes those of the furthest moves are
taken until the weight has changed by `trust` of its norm, and the rest keep their old ones. Of a
trellis-coded weight a "vector" is a stream, with the ends that tie it to itself.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptvq_jax.core.hessian import unit
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import VQTensor
from gptvq_jax.methods import trainable
from gptvq_jax.methods.furthest import furthest, or_one, step_size, trusted
from gptvq_jax.methods.trainable import Parameters, Unpacked
from gptvq_jax.moves.recode import recode
from gptvq_jax.moves.recode_streams import recode_streams
from gptvq_jax.moves.residual import Residual
from gptvq_jax.moves.stream_column import Column, Layout
from gptvq_jax.ops.viterbi import choose_search

BEAM = 4  # lanes of the search where several codebooks are summed


class Recoded(NamedTuple):
    """Of one leaf."""

    codes: jax.Array  # as Unpacked has them
    changed: jax.Array  # () int32, vectors or streams that have other codes now


class _How(NamedTuple):
    """Numbers that no program depends on; see `recode_leaf`."""

    count: int  # vectors
    rate: float
    trust: float


def count_vectors(unpacked: Unpacked) -> int:
    """Vectors of a weight, or streams."""
    leaf = unpacked.leaf
    if isinstance(leaf, TrellisTensor):
        return leaf.cols * leaf.cuts
    return leaf.grid.rows * leaf.grid.num_vectors


def recode_leaf(
    unpacked: Unpacked,
    params: Parameters,
    gradient: jax.Array,
    hessian: jax.Array | None,
    *,
    share: float,
    rate: float,
    trust: float,
    part: float = 1.0,
) -> Recoded:
    """New codes for the vectors that the gradient moves furthest; all others stay as they are.

    Args:
      unpacked: the weight with the codes that it has now.
      params: its parameters, which stay.
      gradient: G (R, C), of any size: only its direction counts.
      hessian: H (C, C), in any unit; None: the identity.
      share: of the vectors, at most; at least one is chosen.
      rate: how far those that are chosen are moved, relative to the size of a vector.
      trust: change of the weight, relative to its norm; the vector with which it is reached is the
        last one.
      part: of share and trust; programs do not depend on it.
    """
    gradient = gradient / or_one(jnp.max(jnp.abs(gradient)))
    if hessian is not None:
        hessian = hessian / unit(hessian)
    vectors = count_vectors(unpacked)
    most = max(1, round(share * vectors))
    count = max(1, round(share * part * vectors))
    if isinstance(unpacked.leaf, TrellisTensor):
        leaf = unpacked.leaf
        most = min(most, leaf.cols)
        native = choose_search(leaf.window_bits, leaf.stream_rows, leaf.cuts)
        how = _How(min(count, most), rate, trust * part)
        return _recode_streams(unpacked, params, gradient, hessian, how, most=most, native=native)
    how = _How(count, rate, trust * part)
    return _recode_vectors(unpacked, params, gradient, hessian, how, most=most)


@partial(jax.jit, static_argnames="most")
def _recode_vectors(unpacked, params, gradient, hessian, how: _How, *, most: int) -> Recoded:
    leaf: VQTensor = trainable.with_parameters(unpacked.leaf, params)
    grid = leaf.grid
    by_vector = grid.padded_cols // grid.dim, grid.dim, grid.padded_rows
    weight, pull = (grid.pad_transpose(x) for x in (trainable.decode(unpacked, params), gradient))
    if hessian is None:
        metric = jnp.eye(grid.padded_cols)
    else:
        metric = jnp.pad(hessian, (0, grid.padded_cols - grid.cols))
    of_vectors = metric.reshape(by_vector[0], grid.dim, by_vector[0], grid.dim)
    of_vectors = jnp.moveaxis(jnp.diagonal(of_vectors, axis1=0, axis2=2), -1, 0)  # (J, D, D)
    trace = jnp.trace(of_vectors, axis1=1, axis2=2)[:, None, None]
    inverse = jnp.linalg.inv(of_vectors + (1e-6 * trace + (trace == 0)) * jnp.eye(grid.dim))

    def squares(x, by):  # x (J, D, R) -> (J, R)
        x = x.reshape(by_vector)
        image = jnp.einsum("jde,jer->jdr", by, x, precision="highest")
        return jnp.sum(x * image, axis=1)

    moves = squares(pull, inverse) * (trace[:, :, 0] > 0)
    size = jnp.sum(squares(weight, of_vectors)) / (grid.rows * grid.num_vectors)
    found = furthest(moves, how.count, most)
    image = -step_size(moves, found.chosen, size, how.rate) * pull
    scales = _scales(leaf)
    more = [(0, 0), (0, by_vector[0] - grid.num_vectors), (0, by_vector[2] - grid.rows)]
    codes = jnp.pad(jnp.swapaxes(unpacked.codes.astype(jnp.int32), 1, 2), more)
    new, residual = recode(
        Residual(jnp.zeros_like(image), image),
        metric,
        leaf.codebook.values(),
        codes,
        scales,
        grid,
        beam=1 if len(codes) == 1 else BEAM,
        movable=found.chosen,
    )
    change = jnp.sum(jnp.square(residual.error).reshape(by_vector), axis=1)
    kept = trusted(found, change, jnp.square(how.trust) * jnp.sum(jnp.square(weight)))
    new = jnp.where(kept, new, codes)
    changed = jnp.sum(jnp.any(new != codes, axis=0), dtype=jnp.int32)
    new = jnp.swapaxes(new[:, : grid.num_vectors, : grid.rows], 1, 2)
    return Recoded(new.astype(unpacked.codes.dtype), changed)


def _scales(leaf: VQTensor) -> jax.Array | None:
    """Of each vector (S * c / D, G * r), 1 on padding; or None."""
    grid, scales = leaf.grid, None
    if leaf.block_scales is not None:
        scales = leaf.block_scales.per_vector(grid)
    if leaf.row_scales is not None:
        of_rows = leaf.row_scales.astype(jnp.float32)[:, None]
        vectors = grid.padded_cols // grid.dim
        scales = (
            jnp.broadcast_to(of_rows, (grid.rows, vectors)) if scales is None else scales * of_rows
        )
    if scales is None:
        return None
    more = (0, 0), (0, grid.padded_rows - grid.rows)
    return jnp.pad(scales.T, more, constant_values=1.0)


@partial(jax.jit, static_argnames=("most", "native"))
def _recode_streams(
    unpacked, params, gradient, hessian, how: _How, *, most: int, native: str
) -> Recoded:
    """Of at most `most` columns, those with the streams that are chosen."""
    leaf: TrellisTensor = trainable.with_parameters(unpacked.leaf, params)
    rates, more = leaf.column_rates(), leaf.cuts * leaf.stream_rows - leaf.rows

    def padded(x):
        return jnp.pad(x.T, ((0, 0), (0, more)))

    def of_streams(square):  # (C, R') -> (C, cuts)
        return jnp.sum(square.reshape(leaf.cols, leaf.cuts, -1), axis=2)

    bend = jnp.ones(leaf.cols) if hessian is None else jnp.diagonal(hessian)
    coded = ((bend > 0) & (rates > 0))[:, None]
    pull = jnp.where(coded, padded(gradient), 0.0)
    moves = of_streams(jnp.square(pull)) / jnp.where(coded, bend[:, None], 1.0)
    square = jnp.square(padded(trainable.decode(unpacked, params)))
    size = jnp.sum(of_streams(square) * bend[:, None] * coded)
    size = size / jnp.maximum(leaf.cuts * jnp.sum(coded), 1)
    furthest_streams = furthest(moves, how.count, most)
    chosen = furthest_streams.chosen
    eta = step_size(moves, chosen, size, how.rate)
    # The columns of the streams that move furthest are those whose largest move is furthest.
    _, columns = jax.lax.top_k(jnp.max(moves, axis=1), most)
    columns = jnp.sort(columns)
    metric = jnp.eye(most) if hessian is None else hessian[columns][:, columns]
    layout = Layout(
        jnp.pad(leaf.row_scales.astype(jnp.float32), (0, more), constant_values=1.0),
        jnp.pad(jnp.ones(leaf.rows), (0, more)),
        leaf.values(),
    )
    image = -eta * pull[columns]
    nothing = jnp.zeros_like(image)
    windows = padded(unpacked.codes.astype(jnp.uint16))
    old = Column(
        windows[columns],
        leaf.col_scales[columns],
        nothing.astype(jnp.float16),
    )
    new, residual = recode_streams(
        Residual(nothing, image),
        metric,
        old,
        rates[columns],
        nothing > 0,
        layout,
        stream_rows=leaf.stream_rows,
        block_size=most,
        native=native,
        movable=chosen[columns],
    )
    change = jnp.sum(jnp.square(residual.error).reshape(most, leaf.cuts, -1), axis=2)
    change = jnp.zeros_like(moves).at[columns].set(change)
    kept = trusted(furthest_streams, change, jnp.square(how.trust) * jnp.sum(square))
    kept = jnp.repeat(kept[columns], leaf.stream_rows, axis=1)
    found = windows.at[columns].set(jnp.where(kept, new.windows, old.windows))
    other = jnp.pad((found != windows)[:, : leaf.rows], ((0, 0), (0, more)))
    other = other.reshape(leaf.cols, leaf.cuts, -1)
    changed = jnp.sum(jnp.any(other, axis=2), dtype=jnp.int32)
    return Recoded(found[:, : leaf.rows].T.astype(unpacked.codes.dtype), changed)
