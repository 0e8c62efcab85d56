"""GPTVQ (arXiv 2402.15319) as a list of moves on one layer."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.hessian import unit
from gptvq_jax.core.packing import pack
from gptvq_jax.core.row_axis import ALL_HERE
from gptvq_jax.core.vq_tensor import (
    BlockScales,
    FactoredCodebook,
    VQTensor,
    concat_rows,
    pack_codes,
)
from gptvq_jax.methods.devices import quantize_parts, quantize_rows
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.moves.compress import (
    quantize_centroids,
    quantize_factors,
    sort_codebook,
    svd_factors,
)
from gptvq_jax.moves.em import em
from gptvq_jax.moves.recode import recode
from gptvq_jax.moves.refit import decode, gradient_update, refit
from gptvq_jax.moves.residual import Residual, image_of, residual_of
from gptvq_jax.moves.rounds import repeat
from gptvq_jax.moves.scales import (
    RowScales,
    StripScales,
    normalize_strip,
    refit_row_scales,
    row_norms,
)
from gptvq_jax.moves.seed import SEEDS
from gptvq_jax.moves.sweep import SweepResult, pad_identity, sweep
from gptvq_jax.ops.columns import choose_columns


class Counts(NamedTuple):
    """The numbers in the settings that no shape depends on: other ones compile nothing anew."""

    em_iterations: int
    update_iterations: int
    learning_rate: float
    polish_rounds: int
    polish_tolerance: float


def _split(settings: GPTVQSettings) -> tuple[GPTVQSettings, Counts]:
    """Settings with every count at its default, and the counts."""
    counts = Counts(*(getattr(settings, name) for name in Counts._fields))
    defaults = {name: getattr(GPTVQSettings, name) for name in Counts._fields}
    return dataclasses.replace(settings, **defaults), counts


def quantize(
    weight: jax.Array,
    hessian: jax.Array,
    hinv_chol: jax.Array,
    key: jax.Array,
    settings: GPTVQSettings,
    *,
    grid: GroupGrid | None = None,
    first_strip: int = 0,
    judge: jax.Array | None = None,
    mesh: Mesh | None = None,
    parts: tuple[GroupGrid, range] | None = None,
) -> VQTensor:
    """Sweep with EM codebooks, codebook update, compression (GPTVQ, Algorithm 1 and section 3.3).

    With `polish_rounds`, codes and codebooks are updated again, in turn. Matrix products: the
    sweep, the first residual, the rounding of the codebooks and each step of their update cost
    2 R C^2 each; a round of polish costs as much twice, and its codebook update. With `judge` each
    round costs as much once more, and so does the start.

    Args:
      weight: (R, C), dead columns already 0.
      hessian: (C, C) mean x x^T, undamped, in any unit.
      hinv_chol: (C, C) U of the damped Hessian, as from `hessian.factorize`, in any unit.
      key: random key of the seeding.
      settings: the row of the table.
      grid, first_strip: where the weight is a part of a taller one (`GPTVQSettings.parts`): the
        part's groups, and the number of its first row strip.
      judge: (C, C) mean x x^T of other inputs, in any unit, by whose loss a round of polish counts
        as better; None: `hessian`.
      mesh: several devices, of one axis, over which the row strips of the whole are spread.
      parts: of the weight (`GPTVQSettings.parts`), each of which one of the devices quantizes by
        itself; None: their sums are those of all strips.
    """
    shape, counts = _split(settings)
    grid = grid or settings.grid(*weight.shape)
    shared = hessian, hinv_chol, judge, key, counts
    if mesh is None:
        return _quantize(weight, first_strip, *shared, shape, grid)
    if parts is not None:
        return concat_rows(quantize_parts(_quantize, shape, mesh, weight, parts, shared))
    return quantize_rows(_quantize, shape, mesh, weight, grid, shared)


@partial(jax.jit, static_argnames=("settings", "grid"))
def _quantize(
    weight, first_strip, hessian, hinv_chol, judge, key, counts, settings, grid
) -> VQTensor:
    target = grid.pad_transpose(weight)

    def padded(hessian):
        return jnp.pad(hessian / unit(hessian), ((0, grid.padded_cols - grid.cols),) * 2)

    hessian, judge = padded(hessian), None if judge is None else padded(judge)
    rows = row_norms(target) if settings.row_scales else None
    swept = _sweep(
        target, pad_identity(hinv_chol, grid), grid, key, first_strip, counts, settings, rows
    )
    blocks = swept.scales if settings.scale_block_size else None
    per_vector = blocks and _stacked_per_vector(blocks, grid)
    problem = _Problem(target, hessian, judge, per_vector, grid, counts, settings)
    centroids, rows, codes = _polish(problem, swept.centroids[None], rows, swept.codes[None])

    if settings.svd_rank:
        centroids, rank = sort_codebook(centroids)
        codes = _rename(codes, rank, grid)
        codebook = _svd_codebook(problem, centroids, rows, codes)
    else:
        codebook = quantize_centroids(centroids, settings.codebook_bits)
    return VQTensor(
        codes=pack_codes(codes, settings.index_bits, grid),
        codebook=codebook,
        block_scales=_stored_scales(blocks, grid, settings.scale_block_size),
        index_bits=settings.index_bits,
        grid=grid,
        row_scales=None if rows is None else rows[: grid.rows].astype(jnp.float16),
    )


class _Problem(NamedTuple):
    """What stays the same while codebooks, row scales and codes change."""

    target: jax.Array  # (S * c, G * r)
    hessian: jax.Array  # (S * c, S * c)
    judge: jax.Array | None  # (S * c, S * c)
    block_scales: jax.Array | None  # (S * c / D, G * r)
    grid: GroupGrid
    counts: Counts
    settings: GPTVQSettings

    def per_vector(self, rows: jax.Array | None) -> jax.Array | None:
        """Scale of each vector (S * c / D, G * r), row scales (G * r,) given; None: all are 1."""
        if rows is None:
            return self.block_scales
        return jnp.broadcast_to(rows, (self.grid.padded_cols // self.grid.dim, *rows.shape))

    def decode(self, centroids: jax.Array, rows: jax.Array | None, codes: jax.Array) -> jax.Array:
        return decode(centroids, codes, self.per_vector(rows), self.grid)

    def loss_of(self, state: "_State") -> jax.Array:
        """What says which round is the best, ()."""
        if self.judge is None:
            return self.grid.axis.sum(state.residual.loss)
        error = state.residual.error
        judged = jnp.vdot(error, image_of(self.judge, error), precision="highest")
        return self.grid.axis.sum(judged)

    def stored(self, centroids: jax.Array) -> jax.Array:
        """Centroids as the tensor will hold them; SVD compresses them once, at the end."""
        if self.settings.svd_rank:
            return centroids
        return quantize_centroids(centroids, self.settings.codebook_bits).values()


def _sweep(target, hinv_chol, grid, key, first_strip, counts, settings, rows) -> SweepResult:
    seed = SEEDS[settings.seed]

    more_rows = grid.axis if grid.shared else ALL_HERE  # of the same codebooks

    def fit(data, keys):
        centroids = seed(data, settings.codebook_size, keys, more_rows)
        return em(data, centroids, counts.em_iterations, more_rows)

    normalize = None
    if settings.scale_block_size:
        normalize = partial(normalize_strip, block_size=settings.scale_block_size, axis=grid.axis)
    elif rows is not None:
        by_strip = rows.reshape(grid.row_strips, grid.strip_rows)
        normalize = lambda strip: RowScales(jnp.broadcast_to(by_strip, strip.shape))  # noqa: E731
    return sweep(
        target,
        hinv_chol,
        grid,
        fit,
        key,
        first_strip=first_strip,
        block_size=settings.block_size,
        exact_metric=settings.exact_metric,
        normalize=normalize,
        native=choose_columns(grid, settings.codebook_size, settings.block_size),
    )


class _State(NamedTuple):
    """Between two rounds."""

    centroids: jax.Array  # (1, S, G, K, D)
    rows: jax.Array | None  # (G * r,) row scales, as stored
    codes: jax.Array  # (1, S * c / D, G * r)
    residual: Residual  # with the centroids as stored


def _polish(problem: _Problem, centroids, rows, codes):
    """Codebook update, then codes and codebooks in turn; codes are chosen for stored centroids.

    Row scales are updated with the codebooks.
    """
    target, hessian, _, _, grid, counts, settings = problem
    refits_rows = rows is not None and settings.codebook_update != "none"
    whole = Residual(target, image_of(hessian, target)) if refits_rows else None  # of Q = 0

    def update(centroids, rows, codes, residual) -> _State:
        centroids, residual = _update_codebooks(problem, centroids, rows, codes, residual)
        rounding = problem.stored(centroids) - centroids
        residual = residual.moved(problem.decode(rounding, rows, codes), hessian)
        if refits_rows:
            rows, residual = refit_row_scales(residual, whole, rows)
        return _State(centroids, rows, codes, residual)

    native = "jax"
    if settings.beam == 1:
        native = choose_columns(grid, settings.codebook_size, settings.block_size)

    def one_round(state: _State) -> _State:
        stored = problem.stored(state.centroids)
        codes, residual = recode(
            state.residual,
            hessian,
            stored,
            state.codes,
            problem.per_vector(state.rows),
            grid,
            beam=settings.beam,
            block_size=settings.block_size,
            native=native,
        )
        return update(stored, state.rows, codes, residual)

    first = residual_of(target, problem.decode(centroids, rows, codes), hessian)
    start = update(centroids, rows, codes, first)
    rounds, tolerance = counts.polish_rounds, counts.polish_tolerance
    last = repeat(one_round, problem.loss_of, start, rounds, tolerance)
    return last.centroids, last.rows, last.codes


def _update_codebooks(problem: _Problem, centroids, rows, codes, residual):
    """Centroids for these codes and row scales, and their residual."""
    target, hessian, _, _, grid, counts, settings = problem
    if settings.codebook_update == "none":
        return centroids, residual
    steps = counts.update_iterations
    if settings.codebook_update == "least_squares":
        scales = problem.per_vector(rows)
        return refit(residual, hessian, centroids, codes, scales, grid, steps)
    centroids = gradient_update(
        target,
        hessian,
        centroids,
        lambda c: problem.decode(c, rows, codes),
        iterations=steps,
        optimizer=optax.adam(counts.learning_rate),
        axis=grid.axis,
        shared=grid.shared,
    )
    return centroids, residual_of(target, problem.decode(centroids, rows, codes), hessian)


def _svd_codebook(problem: _Problem, centroids, rows, codes) -> FactoredCodebook:
    """Rank-reduced codebooks, factors tuned on the loss before they are rounded."""

    def reconstruct(factors):
        left, right = factors
        product = jnp.matmul(left, right, precision="highest")[..., None]
        return problem.decode(product, rows, codes)

    settings, counts, grid = problem.settings, problem.counts, problem.grid
    more_strips = ALL_HERE if grid.shared else grid.axis
    factors = svd_factors(centroids, settings.svd_rank, more_strips)
    if settings.codebook_update != "none":
        factors = gradient_update(
            problem.target,
            problem.hessian,
            factors,
            reconstruct,
            iterations=counts.update_iterations,
            optimizer=optax.adam(counts.learning_rate),
            axis=grid.axis,
            shared=(grid.shared, True),
        )
    return quantize_factors(*factors, settings.codebook_bits, more_strips)


def _rename(codes: jax.Array, rank: jax.Array, grid: GroupGrid) -> jax.Array:
    """Codes after centroid k of each group became centroid rank[..., k]."""
    new = decode(rank[..., None].astype(jnp.float32), codes, None, grid)
    # Padding decodes to 0, a valid code that is never stored.
    return new.astype(jnp.int32)[None]


def _stacked_per_vector(scales: StripScales, grid: GroupGrid) -> jax.Array:
    per_vector = jax.vmap(lambda s: s.per_vector(grid.dim))(scales)
    return per_vector.reshape(-1, grid.padded_rows)


def _stored_scales(
    scales: StripScales | None, grid: GroupGrid, block_size: int
) -> BlockScales | None:
    if scales is None:
        return None
    strips, blocks = scales.codes.shape[:2]
    codes = scales.codes.reshape(strips, blocks, grid.padded_rows)[..., : grid.rows]
    packed = pack(jnp.transpose(codes, (2, 0, 1)), 4)
    return BlockScales(packed, scales.offset, scales.step, block_size, blocks)
