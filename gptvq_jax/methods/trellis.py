"""Trellis codes with a rate for every column (QTIP's codes in GPTQ's sweep), as a list of moves.

Outliers are set aside, every column gets its bits by water-filling, a sweep codes the columns with
error feedback, and passes of coordinate descent code them again. The budget is that of all bytes.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.core import flops, packing
from gptvq_jax.core.hessian import unit
from gptvq_jax.core.trellis_table import MAX_BITS, MIN_BITS
from gptvq_jax.core.trellis_tensor import (
    MAX_RATE,
    TrellisTensor,
    pack_outliers,
    pack_streams,
    stream_bytes,
    table_values,
)
from gptvq_jax.moves.outliers import set_aside
from gptvq_jax.moves.rates import water_fill
from gptvq_jax.moves.recode_streams import recode_streams
from gptvq_jax.moves.residual import residual_of
from gptvq_jax.moves.stream_column import Layout
from gptvq_jax.moves.sweep_streams import sweep_streams
from gptvq_jax.ops.viterbi import choose_search

OUTLIER_BYTES = 4  # a gap and a value


@dataclasses.dataclass(frozen=True)
class TrellisSettings:
    """Of method 'trellis'; hashable."""

    bits: float = 2.125  # true bits per value: codes, rates, scales and outliers; never more
    window_bits: int = 12  # L, 4 to 16: the search takes 2^L steps per weight
    stream_rows: int = 256  # T, about: rows that are coded as one
    column_rates: bool = True  # False: as far as the budget allows, all columns the same
    outlier_limit: float = 4.5  # standard deviations beyond which a weight is kept; 0: none is
    recode_passes: int = 2  # passes of coordinate descent after the sweep
    block_size: int = 128  # columns per lazy update

    def __post_init__(self):
        def check(ok: bool, field: str, allowed: str):
            if not ok:
                raise ValueError(f"trellis.{field}={getattr(self, field)!r} must be {allowed}")

        check(0 < self.bits <= MAX_RATE, "bits", f"above 0, to {MAX_RATE}")
        whole = MIN_BITS <= self.window_bits <= MAX_BITS
        check(whole, "window_bits", f"{MIN_BITS} to {MAX_BITS}")
        check(self.stream_rows >= self.window_bits, "stream_rows", "at least window_bits")
        check(self.outlier_limit == 0 or self.outlier_limit >= 2, "outlier_limit", "0, or 2 up")
        check(self.recode_passes >= 0, "recode_passes", "at least 0")
        check(self.block_size >= 1, "block_size", "at least 1")

    @property
    def most_rate(self) -> int:
        """Most bits of a column's weight."""
        return min(MAX_RATE, self.window_bits)

    def rows_of_stream(self, rows: int) -> int:
        """T for R rows: even cuts, of whole bytes at every rate, no shorter than a window."""
        cuts = max(1, round(rows / self.stream_rows))
        return -(-max(-(-rows // cuts), self.window_bits) // 8) * 8

    def budget_bytes(self, rows: int, cols: int) -> int:
        """Of a layer."""
        return int(self.bits * rows * cols / 8 + 1e-6)

    def flops(self, rows: int, cols: int) -> int:
        """Of matrix products of a layer."""
        block = min(self.block_size, cols)
        padded = -(-cols // block) * block
        recode = flops.recode(rows, padded, block, self.recode_passes)
        first = flops.unit(rows, padded) if self.recode_passes else 0
        return flops.lazy_pass(rows, padded, block) + first + recode


class Demand(NamedTuple):
    """What a layer's bits are allocated by."""

    row_scales: jax.Array  # (R,) float16
    outliers: jax.Array  # (R, C) bool
    values: jax.Array  # (C,) what each column adds to the loss if it is 0 but for outliers
    counts: jax.Array  # (C,) outliers


@partial(jax.jit, static_argnames="settings")
def demand(weight: jax.Array, hinv_chol: jax.Array, settings: TrellisSettings) -> Demand:
    """Row scales, outliers and the worth of every column of a weight (R, C)."""
    aside = set_aside(weight, settings.outlier_limit)
    inner = jnp.where(aside.outliers, 0.0, weight)
    values = jnp.sum(jnp.square(inner), axis=0) / jnp.square(jnp.diagonal(hinv_chol))
    return Demand(aside.row_scales, aside.outliers, values, jnp.sum(aside.outliers, axis=0))


def fixed_bytes(rows: int, cols: int) -> int:
    """Of what a layer stores beside codes and outliers: scales and rates."""
    return 2 * rows + 2 * cols + packing.packed_length(cols, 4)


def bytes_per_bit(rows: int, settings: TrellisSettings) -> int:
    """Of one more bit for each weight of a column."""
    stream_rows = settings.rows_of_stream(rows)
    return -(-rows // stream_rows) * int(stream_bytes(1, stream_rows))


def choose_rates(
    values: np.ndarray, num_outliers: int, shape: tuple[int, int], settings: TrellisSettings
) -> np.ndarray:
    """Bits (C,) of every column within the budget of a layer.

    Raises:
      ValueError: the budget is below what scales, rates and outliers take.
    """
    rows, cols = shape
    fixed = fixed_bytes(rows, cols) + OUTLIER_BYTES * num_outliers
    left = settings.budget_bytes(rows, cols) - fixed
    if left < 0:
        least = 8 * fixed / (rows * cols)
        raise ValueError(
            f"trellis.bits={settings.bits:g} is below what the scales, rates and {num_outliers} "
            f"outliers of a {rows} x {cols} layer take; set at least {least:.3f}, or raise "
            "trellis.outlier_limit"
        )
    cost = bytes_per_bit(rows, settings)
    if not settings.column_rates:
        return np.full(cols, min(left // (cost * cols), settings.most_rate))
    return water_fill(values, np.full(cols, cost), left, settings.most_rate)


def quantize(
    weight: jax.Array,
    hessian: jax.Array,
    hinv_chol: jax.Array,
    key: jax.Array,
    settings: TrellisSettings,
) -> TrellisTensor:
    """Codes a layer within `settings.bits` true bits per value.

    Args:
      weight: (R, C), dead columns already 0.
      hessian: (C, C) mean x x^T, undamped, in any unit.
      hinv_chol: (C, C) U of the damped Hessian, in any unit.
      key: not used: nothing is drawn.
      settings: of the method.

    Raises:
      ValueError: the budget is below what is stored beside the codes.
    """
    del key
    rows, cols = weight.shape
    of_layer = demand(weight, hinv_chol, _shape_of(settings))
    outliers = np.asarray(of_layer.outliers)
    places = np.flatnonzero(outliers.T)
    gaps, _ = pack_outliers(places, np.zeros(len(places)))
    rates = choose_rates(np.asarray(of_layer.values), len(gaps), weight.shape, settings)
    stream_rows = settings.rows_of_stream(rows)
    codes, scales, values = _code(
        weight,
        hessian,
        hinv_chol,
        of_layer,
        jnp.asarray(rates, jnp.int32),
        settings.recode_passes,
        _shape_of(settings),
        choose_search(settings.window_bits, stream_rows, -(-rows // stream_rows)),
    )
    codes = np.asarray(codes).T.reshape(-1, stream_rows, cols)
    gaps, added = pack_outliers(places, np.asarray(values).reshape(-1)[places])
    return TrellisTensor(
        codes=jnp.asarray(pack_streams(codes, rates)),
        rates=packing.pack(jnp.asarray(rates), 4),
        row_scales=of_layer.row_scales,
        col_scales=scales,
        levels=None,
        outlier_gaps=jnp.asarray(gaps) if len(gaps) else None,
        outlier_values=jnp.asarray(added) if len(gaps) else None,
        rows=rows,
        cols=cols,
        stream_rows=stream_rows,
        window_bits=settings.window_bits,
    )


def _shape_of(settings: TrellisSettings) -> TrellisSettings:
    """Settings without the numbers that no program depends on."""
    return dataclasses.replace(settings, bits=2.0, recode_passes=0)


@partial(jax.jit, static_argnames=("settings", "native"))
def _code(weight, hessian, hinv_chol, of_layer: Demand, rates, passes, settings, native):
    """Codes (C, R') uint8, column scales (C,) and what outliers add (C, R), of one layer."""
    rows, cols = weight.shape
    stream_rows = settings.rows_of_stream(rows)
    block = min(settings.block_size, cols)
    more_rows, more_cols = -rows % stream_rows, -cols % block

    def padded(x, value=0):
        return jnp.pad(x.T, ((0, more_cols), (0, more_rows)), constant_values=value)

    target, outliers = padded(weight), padded(of_layer.outliers)
    scales = of_layer.row_scales.astype(jnp.float32)
    layout = Layout(
        jnp.pad(scales, (0, more_rows), constant_values=1.0),
        jnp.pad(jnp.ones(rows), (0, more_rows)),
        table_values(settings.window_bits, None),
    )
    rates = jnp.pad(rates, (0, more_cols))
    options = {"stream_rows": stream_rows, "block_size": block, "native": native}
    chol = jax.scipy.linalg.block_diag(hinv_chol, jnp.eye(more_cols)) if more_cols else hinv_chol
    columns, quantized = sweep_streams(target, chol, rates, outliers, layout, **options)

    def polished(columns):
        h = jnp.pad(hessian / unit(hessian), ((0, more_cols),) * 2)
        state = columns, residual_of(target, quantized, h)

        def one_pass(_, state):
            return recode_streams(state[1], h, state[0], rates, outliers, layout, **options)

        return jax.lax.fori_loop(0, passes, one_pass, state)[0]

    columns = jax.lax.cond(passes > 0, polished, lambda columns: columns, columns)
    columns = jax.tree.map(lambda x: x[:cols], columns)
    codes = columns.windows & ((1 << rates[:cols, None]) - 1).astype(jnp.uint16)
    return codes.astype(jnp.uint8), columns.scale, columns.added[:, :rows]
