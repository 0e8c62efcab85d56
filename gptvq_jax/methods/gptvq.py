"""GPTVQ (arXiv 2402.15319) as a list of moves on one layer."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptvq_jax.core import flops
from gptvq_jax.core.grid import GroupGrid, make_grid
from gptvq_jax.core.hessian import unit
from gptvq_jax.core.packing import pack
from gptvq_jax.core.vq_tensor import BlockScales, FactoredCodebook, VQTensor, pack_codes
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

_PART_ROWS = 256  # most rows of a part, unless a codebook has more
CODEBOOK_UPDATES = ("least_squares", "adam", "none")
MAX_CODE_BITS = 12  # k-means++ and every search make a pass over the layer for each centroid


def makes_codes(dim: int, bits: float) -> bool:
    """Whether vectors of `dim` weights at `bits` per weight have codes of 1 to 12 whole bits."""
    width = round(dim * bits)
    return abs(dim * bits - width) < 1e-6 and 1 <= width <= MAX_CODE_BITS


@dataclasses.dataclass(frozen=True)
class GPTVQSettings:
    """One row of the paper's tables; hashable, so that a compiled step is made once per setting."""

    dim: int = 2  # D: weights per vector: 1, 2 or 4 in the paper
    bits: float = 3.0  # index bits per weight; dim * bits, 1 to 12, is the width of a code
    group_size: int = 0  # weights that share a codebook; 0: as few as codebook_overhead allows
    codebook_overhead: float = 0.125  # most bits per weight spent on codebooks, if group_size is 0
    max_group_cols: int = 256  # widest group
    seed: str = "kmeans++"  # 'mahalanobis' (paper), 'kmeans++', 'random', 'cdf' (1D)
    em_iterations: int = 20  # the paper uses 100
    exact_metric: bool = True  # False: the diagonal of the block metric (paper)
    block_size: int = 128  # columns per lazy update
    scale_block_size: int = 0  # weights per 4-bit block scale, 8 to 128; 0: no normalization
    row_scales: bool = False  # a float16 scale for every output row: 16 / C bits per weight
    codebook_update: str = "least_squares"  # 'adam' (paper), 'none'
    update_iterations: int = 2  # steps of conjugate gradients, or of Adam (the paper: 25)
    learning_rate: float = 1e-3  # of Adam, relative to the root mean square of the codebooks
    polish_rounds: int = 2  # most alternations of codebook update and recode (the paper: 0)
    polish_tolerance: float = 0.005  # stop when a round lowers the loss by less than this fraction
    beam: int = 1  # of polish: width of the beam search over the codes of a row, 1 to 8
    codebook_bits: int = 8  # 16, 8 or 4 bits per stored centroid coordinate
    svd_rank: int = 0  # 1D: rank of all codebooks together; 0: stored one by one

    def __post_init__(self):
        def check(ok: bool, field: str, allowed: str):
            if not ok:
                raise ValueError(f"vq.{field}={getattr(self, field)!r} must be {allowed}")

        check(self.dim >= 1, "dim", "at least 1 (the paper uses 1, 2 and 4)")
        check(
            makes_codes(self.dim, self.bits),
            "bits",
            f"such that dim * bits is a whole number from 1 to {MAX_CODE_BITS}; dim is {self.dim}",
        )
        check(self.group_size >= 0, "group_size", "0 or the weights per codebook")
        check(self.codebook_overhead > 0, "codebook_overhead", "above 0")
        check(self.max_group_cols >= self.dim, "max_group_cols", f"at least dim={self.dim}")
        check(self.seed in SEEDS, "seed", f"one of {', '.join(SEEDS)}")
        check(self.seed != "cdf" or self.dim == 1, "seed", "another one unless dim is 1")
        check(self.em_iterations >= 0, "em_iterations", "at least 0")
        check(self.block_size >= 1, "block_size", "at least 1")
        check(
            self.scale_block_size == 0
            or 8 <= self.scale_block_size <= 128
            and self.scale_block_size % self.dim == 0,
            "scale_block_size",
            f"0, or 8 to 128 and a multiple of dim={self.dim}",
        )
        check(
            not (self.row_scales and self.scale_block_size),
            "row_scales",
            "False unless scale_block_size is 0: a row has one kind of scales",
        )
        check(
            self.codebook_update in CODEBOOK_UPDATES,
            "codebook_update",
            f"one of {', '.join(CODEBOOK_UPDATES)}",
        )
        check(self.update_iterations >= 1, "update_iterations", "at least 1")
        check(self.learning_rate > 0, "learning_rate", "above 0")
        check(self.polish_rounds >= 0, "polish_rounds", "at least 0")
        check(0 <= self.polish_tolerance < 1, "polish_tolerance", "from 0 to below 1")
        check(1 <= self.beam <= 8, "beam", "1 to 8")
        check(self.codebook_bits in (4, 8, 16), "codebook_bits", "16, 8 or 4")
        check(self.svd_rank >= 0, "svd_rank", "0 or the rank to keep")
        check(self.svd_rank == 0 or self.dim == 1, "svd_rank", "0 unless dim is 1")
        check(
            self.svd_rank == 0 or self.codebook_bits != 4,
            "codebook_bits",
            "8 or 16 when svd_rank is set",
        )

    @property
    def index_bits(self) -> int:
        """Bits of one code."""
        return round(self.bits * self.dim)

    @property
    def codebook_size(self) -> int:
        """K: centroids of one codebook."""
        return 2**self.index_bits

    def grid(self, rows: int, cols: int) -> GroupGrid:
        """Groups of a rows x cols weight."""
        return make_grid(
            rows,
            cols,
            dim=self.dim,
            group_size=self.group_size or self.smallest_group(),
            max_group_cols=self.max_group_cols,
        )

    def parts(self, rows: int, cols: int) -> tuple[GroupGrid, range]:
        """Cuts the rows where no codebook is shared, into equal parts of some hundred rows.

        Seeds, EM, sweep and recode are those of the whole, and so is a converged least squares;
        on the way there every part takes steps of its own length, and stops by its own gain.

        Returns:
          The grid of one part, and the first row of each.
        """
        grid = self.grid(rows, cols)
        shared = self.svd_rank or self.scale_block_size or rows % grid.strip_rows
        strips = grid.row_strips
        count = 1
        if not shared:  # as few parts as are small enough
            enough = (n for n in range(1, strips) if strips % n == 0 and rows // n <= _PART_ROWS)
            count = next(enough, strips)
        return dataclasses.replace(grid, rows=rows // count), range(0, rows, rows // count)

    def flops(self, rows: int, cols: int) -> int:
        """Of matrix products of a layer, at most: rounds of polish may be fewer."""
        block = self.grid(rows, cols).block_cols(self.block_size)
        one = flops.unit(rows, cols)
        adam = (2 * (self.update_iterations + 1) + 1) * one  # losses with gradients, and that of 0
        updates = {
            "none": 0,
            "least_squares": flops.refit(rows, cols, self.update_iterations),
            "adam": adam + one,  # and its residual
        }
        update = updates[self.codebook_update] + one  # and the residual of rounded codebooks
        one_round = flops.recode(rows, cols, block, beam=self.beam) + update
        first = 0 if self.codebook_update == "adam" else one  # Adam takes no residual
        of_svd = adam if self.svd_rank and self.codebook_update != "none" else 0
        swept = flops.lazy_pass(rows, cols, block)
        if self.row_scales and self.codebook_update != "none":
            first += one  # the image of the weight
        return swept + first + update + self.polish_rounds * one_round + of_svd

    def smallest_group(self) -> int:
        """Fewest weights whose codebook costs at most `codebook_overhead` bits per weight."""
        scale = 0 if self.codebook_bits == 16 else 16
        stored = self.codebook_size * self.dim * self.codebook_bits + scale
        if self.svd_rank:
            stored = self.svd_rank * self.codebook_bits
        return -int(-stored // self.codebook_overhead)


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
) -> VQTensor:
    """Sweep with EM codebooks, codebook update, compression (GPTVQ, Algorithm 1 and section 3.3).

    With `polish_rounds`, codes and codebooks are updated again, in turn. Matrix products: the
    sweep, the first residual, the rounding of the codebooks and each step of their update cost
    2 R C^2 each; a round of polish costs as much twice, and its codebook update.

    Args:
      weight: (R, C), dead columns already 0.
      hessian: (C, C) mean x x^T, undamped, in any unit.
      hinv_chol: (C, C) U of the damped Hessian, as from `hessian.factorize`, in any unit.
      key: random key of the seeding.
      settings: the row of the table.
      grid, first_strip: where the weight is a part of a taller one (`GPTVQSettings.parts`): the
        part's groups, and the number of its first row strip.
    """
    shape, counts = _split(settings)
    grid = grid or settings.grid(*weight.shape)
    return _quantize(weight, hessian, hinv_chol, key, first_strip, counts, shape, grid)


@partial(jax.jit, static_argnames=("settings", "grid"))
def _quantize(weight, hessian, hinv_chol, key, first_strip, counts, settings, grid) -> VQTensor:
    target = grid.pad_transpose(weight)
    hessian = jnp.pad(hessian / unit(hessian), ((0, grid.padded_cols - grid.cols),) * 2)
    rows = row_norms(target) if settings.row_scales else None
    swept = _sweep(
        target, pad_identity(hinv_chol, grid), grid, key, first_strip, counts, settings, rows
    )
    blocks = swept.scales if settings.scale_block_size else None
    per_vector = blocks and _stacked_per_vector(blocks, grid)
    problem = _Problem(target, hessian, per_vector, grid, counts, settings)
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

    def stored(self, centroids: jax.Array) -> jax.Array:
        """Centroids as the tensor will hold them; SVD compresses them once, at the end."""
        if self.settings.svd_rank:
            return centroids
        return quantize_centroids(centroids, self.settings.codebook_bits).values()


def _sweep(target, hinv_chol, grid, key, first_strip, counts, settings, rows) -> SweepResult:
    seed = SEEDS[settings.seed]

    def fit(data, keys):
        centroids = seed(data, settings.codebook_size, keys)
        return em(data, centroids, counts.em_iterations)

    normalize = None
    if settings.scale_block_size:
        normalize = partial(normalize_strip, block_size=settings.scale_block_size)
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
    target, hessian, _, grid, counts, settings = problem
    refits_rows = rows is not None and settings.codebook_update != "none"
    whole = Residual(target, image_of(hessian, target)) if refits_rows else None  # of Q = 0

    def update(centroids, rows, codes, residual) -> _State:
        centroids, residual = _update_codebooks(problem, centroids, rows, codes, residual)
        rounding = problem.stored(centroids) - centroids
        residual = residual.moved(problem.decode(rounding, rows, codes), hessian)
        if refits_rows:
            rows, residual = refit_row_scales(residual, whole, rows)
        return _State(centroids, rows, codes, residual)

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
        )
        return update(stored, state.rows, codes, residual)

    first = residual_of(target, problem.decode(centroids, rows, codes), hessian)
    start = update(centroids, rows, codes, first)
    rounds, tolerance = counts.polish_rounds, counts.polish_tolerance
    last = repeat(one_round, lambda state: state.residual.loss, start, rounds, tolerance)
    return last.centroids, last.rows, last.codes


def _update_codebooks(problem: _Problem, centroids, rows, codes, residual):
    """Centroids for these codes and row scales, and their residual."""
    target, hessian, _, grid, counts, settings = problem
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
    )
    return centroids, residual_of(target, problem.decode(centroids, rows, codes), hessian)


def _svd_codebook(problem: _Problem, centroids, rows, codes) -> FactoredCodebook:
    """Rank-reduced codebooks, factors tuned on the loss before they are rounded."""

    def reconstruct(factors):
        left, right = factors
        product = jnp.matmul(left, right, precision="highest")[..., None]
        return problem.decode(product, rows, codes)

    settings, counts = problem.settings, problem.counts
    factors = svd_factors(centroids, settings.svd_rank)
    if settings.codebook_update != "none":
        factors = gradient_update(
            problem.target,
            problem.hessian,
            factors,
            reconstruct,
            iterations=counts.update_iterations,
            optimizer=optax.adam(counts.learning_rate),
        )
    return quantize_factors(*factors, settings.codebook_bits)


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
