"""AQLM (arXiv 2401.06118, sections 3.1 to 3.3) as a list of moves on one layer.

A vector of D weights is the scale of its row times the sum of one centroid of each of M codebooks,
which the whole layer shares. Block tuning (section 3.4) is in finetune.py.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gptvq_jax.core import flops
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.hessian import unit
from gptvq_jax.core.vq_tensor import VQTensor, pack_codes
from gptvq_jax.methods.check_fields import field_check
from gptvq_jax.methods.devices import quantize_rows
from gptvq_jax.moves.compress import quantize_centroids
from gptvq_jax.moves.em import GroupData, assign, em
from gptvq_jax.moves.nearest import lookup
from gptvq_jax.moves.recode import recode
from gptvq_jax.moves.refit import decode, gradient_update, refit
from gptvq_jax.moves.reseed import reseed
from gptvq_jax.moves.residual import Residual, image_of, residual_of
from gptvq_jax.moves.rounds import repeat
from gptvq_jax.moves.scales import RowScales, refit_row_scales, row_norms
from gptvq_jax.moves.seed import SEEDS
from gptvq_jax.moves.sweep import pad_identity, sweep, whitening
from gptvq_jax.ops.columns import choose_columns

STARTS = ("product", "residual")
CODEBOOK_UPDATES = ("least_squares", "adam")
_LARGEST_KMEANS = 12  # bits of a code up to which k-means++, a pass per centroid, is practical


@dataclasses.dataclass(frozen=True)
class AQLMSettings:
    """Named as in the paper: 2x8 is two codebooks of 8-bit codes."""

    num_codebooks: int = 2  # M
    code_bits: int = 8  # B: a codebook has 2^B centroids
    dim: int = 8  # D: weights per vector, 4, 8 or 16; M * B / D are the index bits per weight
    start: str = "product"  # sweep of sub-vectors, one codebook each; 'residual' k-means (paper)
    seed: str = "kmeans++"  # of the k-means; 'random' for codes of more than 12 bits
    em_iterations: int = 20  # of the k-means
    beam: int = 1  # width of the beam search over codes, 1 to 8
    rounds: int = 8  # most alternations of codebooks, scales and codes
    tolerance: float = 0.002  # stop when a round lowers the loss by less than this fraction
    codebook_update: str = "least_squares"  # 'adam' (paper)
    update_iterations: int = 4  # steps of conjugate gradients, or of Adam (paper: 100)
    learning_rate: float = 1e-4  # of Adam, relative to the root mean square of a codebook
    block_size: int = 128  # columns per lazy update

    def __post_init__(self):
        check = field_check(self, "aqlm")
        check(1 <= self.num_codebooks <= 16, "num_codebooks", "1 to 16")
        check(1 <= self.code_bits <= 16, "code_bits", "1 to 16")
        check(self.dim in (4, 8, 16), "dim", "4, 8 or 16")
        check(self.start in STARTS, "start", f"one of {', '.join(STARTS)}")
        check(
            self.start != "product" or self.dim % self.num_codebooks == 0,
            "start",
            f"'residual' where num_codebooks={self.num_codebooks} does not divide dim={self.dim}",
        )
        seeds = ("kmeans++", "random", "mahalanobis")
        check(self.seed in seeds, "seed", f"one of {', '.join(seeds)}")
        check(
            self.seed != "kmeans++" or self.code_bits <= _LARGEST_KMEANS,
            "seed",
            f"'random' for codes of more than {_LARGEST_KMEANS} bits",
        )
        check(self.em_iterations >= 0, "em_iterations", "at least 0")
        check(1 <= self.beam <= 8, "beam", "1 to 8")
        check(self.rounds >= 0, "rounds", "at least 0")
        check(0 <= self.tolerance < 1, "tolerance", "from 0 to below 1")
        check(
            self.codebook_update in CODEBOOK_UPDATES,
            "codebook_update",
            f"one of {', '.join(CODEBOOK_UPDATES)}",
        )
        check(self.update_iterations >= 1, "update_iterations", "at least 1")
        check(self.learning_rate > 0, "learning_rate", "above 0")
        check(self.block_size >= 1, "block_size", "at least 1")

    @property
    def codebook_size(self) -> int:
        """K: centroids of one codebook."""
        return 2**self.code_bits

    def flops(self, rows: int, cols: int) -> int:
        """Of matrix products of a layer, at most: rounds may be fewer."""
        block = self.grid(rows, cols).block_cols(self.block_size)
        one = flops.unit(rows, cols)
        update = flops.refit(rows, cols, self.update_iterations) + one  # what rounding changes
        if self.codebook_update == "adam":
            update = (2 * (self.update_iterations + 1) + 2) * one  # its unit, and a residual
        recode = flops.recode(rows, cols, block, beam=self.beam)
        swept = flops.lazy_pass(rows, cols, block) if self.start == "product" else 0
        first = one if self.codebook_update == "adam" else 2 * one  # and that of Q = 0
        return swept + first + self.rounds * (update + recode) + update

    def grid(self, rows: int, cols: int) -> GroupGrid:
        """One group; inputs that vectors do not divide are padded."""
        return GroupGrid(rows, cols, self.dim, rows, -(-cols // self.dim) * self.dim)


def quantize(
    weight: jax.Array,
    hessian: jax.Array,
    hinv_chol: jax.Array,
    key: jax.Array,
    settings: AQLMSettings,
    *,
    mesh: Mesh | None = None,
) -> VQTensor:
    """Start, then codebooks, scales and codes in turn, each given the others.

    Args:
      weight: (R, C), dead columns already 0.
      hessian: (C, C) mean x x^T, undamped, in any unit.
      hinv_chol: (C, C) U of the damped Hessian, as from `hessian.factorize`, in any unit.
      key: random key of the seeding.
      settings: the format and the search.
      mesh: several devices, of one axis, over which the rows are spread. What the codebooks, which
        all rows share, are made of is summed up: its last bits may differ from one device's.
    """
    grid, shared = settings.grid(*weight.shape), (hessian, hinv_chol, key)
    if mesh is None:
        return _quantize(weight, 0, *shared, settings, grid)
    return quantize_rows(_quantize, settings, mesh, weight, grid, shared)


@partial(jax.jit, static_argnames=("settings", "grid"))
def _quantize(weight, first_strip, hessian, hinv_chol, key, settings, grid) -> VQTensor:
    del first_strip  # there is one
    target = grid.pad_transpose(weight)
    hessian = jnp.pad(hessian / unit(hessian), ((0, grid.padded_cols - grid.cols),) * 2)
    hinv_chol = pad_identity(hinv_chol, grid)
    start = _product_start if settings.start == "product" else _residual_start
    scale = row_norms(target)
    centroids, codes = start(target, hinv_chol, scale, grid, key, settings)

    def per_vector(scale):
        return jnp.broadcast_to(scale, (grid.strip_vectors, grid.rows))

    def update(state):
        centroids, scale, codes, residual = state
        if settings.codebook_update == "adam":
            centroids, scale = _adam(target, hessian, centroids, scale, codes, grid, settings)
            centroids = _stored(centroids)
            quantized = decode(centroids, codes, per_vector(scale), grid)
            residual = residual_of(target, quantized, hessian)
        else:
            fitted, residual = refit(
                residual,
                hessian,
                centroids,
                codes,
                per_vector(scale),
                grid,
                settings.update_iterations,
            )
            centroids = _stored(fitted)
            rounding = decode(centroids - fitted, codes, per_vector(scale), grid)
            residual = residual.moved(rounding, hessian)
            scale, residual = refit_row_scales(residual, whole, scale)
        # Of centroids that no code points to: the residual stays what it is.
        centroids = reseed(residual, hessian, centroids, codes, per_vector(scale), grid)
        return _State(_stored(centroids), scale, codes, residual)

    def one_round(state):
        centroids, scale, codes, residual = update(state)
        codes, residual = recode(
            residual,
            hessian,
            centroids,
            codes,
            per_vector(scale),
            grid,
            beam=settings.beam,
            block_size=settings.block_size,
        )
        return _State(centroids, scale, codes, residual)

    def loss_of(state):
        return grid.axis.sum(state.residual.loss)

    centroids = _stored(centroids)
    first = residual_of(target, decode(centroids, codes, per_vector(scale), grid), hessian)
    whole = None  # of Q = 0
    if settings.codebook_update != "adam":
        whole = Residual(target, image_of(hessian, target))
    state = _State(centroids, scale, codes, first)
    state = repeat(one_round, loss_of, state, settings.rounds, settings.tolerance)
    centroids, scale, codes, _ = repeat(update, loss_of, state, 1, 0.0)
    return VQTensor(
        codes=pack_codes(codes, settings.code_bits, grid),
        codebook=quantize_centroids(centroids, 16),
        block_scales=None,
        index_bits=settings.code_bits,
        grid=grid,
        row_scales=scale.astype(jnp.float16),
    )


class _State(NamedTuple):
    """Between two rounds, everything as it will be stored."""

    centroids: jax.Array  # (M, 1, 1, K, D)
    scale: jax.Array  # (R,)
    codes: jax.Array  # (M, J, R)
    residual: Residual


def _stored(centroids: jax.Array) -> jax.Array:
    return quantize_centroids(centroids, 16).values()


def _fit(settings: AQLMSettings, grid: GroupGrid):
    """k-means of one codebook: GroupData, keys (1,) -> (1, K, d)."""

    def fit(data, keys):
        centroids = SEEDS[settings.seed](data, settings.codebook_size, keys, grid.axis)
        return em(data, centroids, settings.em_iterations, grid.axis)

    return fit


def _product_start(target, hinv_chol, scale, grid, key, settings):
    """Codebook m holds coordinates [m D / M, (m + 1) D / M) of a vector and 0 elsewhere.

    A GPTVQ sweep quantizes these sub-vectors, with one codebook for all, feeding the error of each
    into the rest. From there the rounds let every codebook have all coordinates.
    """
    books = settings.num_codebooks
    part = grid.dim // books
    of_parts = dataclasses.replace(grid, dim=part)
    swept = sweep(
        target,
        hinv_chol,
        of_parts,
        _fit(settings, grid),
        key,
        block_size=settings.block_size,
        normalize=lambda strip: RowScales(jnp.broadcast_to(scale, strip.shape)),
        native=choose_columns(of_parts, settings.codebook_size, settings.block_size),
    )
    pads = [(m * part, grid.dim - (m + 1) * part) for m in range(books)]
    centroids = [jnp.pad(swept.centroids, ((0, 0), (0, 0), (0, 0), pad)) for pad in pads]
    codes = swept.codes.reshape(grid.strip_vectors, books, grid.rows)
    return jnp.stack(centroids), jnp.swapaxes(codes, 0, 1)


def _residual_start(target, hinv_chol, scale, grid, key, settings):
    """Each codebook is fitted to what those before it have left (paper, section 3.1)."""
    vectors, dim = grid.strip_vectors, grid.dim
    residual = (target / scale).reshape(1, vectors, dim, -1)
    weight = jnp.broadcast_to(jnp.square(scale) * grid.row_mask(), (1, vectors, grid.rows))
    whiten, fit = whitening(hinv_chol, grid), _fit(settings, grid)
    found = []
    for m in range(settings.num_codebooks):
        data = GroupData(residual, whiten, weight)
        centroids = fit(data, jax.random.fold_in(key, m)[None])
        codes, _ = assign(data, centroids)
        vectors_of = lookup(centroids, codes.reshape(1, -1)).reshape(1, dim, vectors, -1)
        residual = residual - jnp.swapaxes(vectors_of, 1, 2)
        found.append((centroids[None], codes[0]))
    centroids, codes = zip(*found, strict=True)
    return jnp.stack(centroids), jnp.stack(codes)


def _adam(target, hessian, centroids, scale, codes, grid, settings):
    """The paper's update of codebooks and scales together: Adam without momentum, with amsgrad."""

    def reconstruct(params):
        centroids, scale = params
        return decode(centroids, codes, None, grid) * scale

    centroids, scale = gradient_update(
        target,
        hessian,
        (centroids, scale),
        reconstruct,
        optimizer=optax.amsgrad(settings.learning_rate, b1=0.0, b2=0.95),
        iterations=settings.update_iterations,
        axis=grid.axis,
        shared=(True, False),
    )
    return centroids, scale.astype(jnp.float16).astype(jnp.float32)
