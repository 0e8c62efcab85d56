"""Trellis codes with a rate for every column (QTIP's codes in GPTQ's sweep), as a list of moves.

Outliers are set aside, every column gets its bits by water-filling, a sweep codes the columns with
error feedback, and passes of coordinate descent code them again. The budget is that of all bytes.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptvq_jax.core import packing
from gptvq_jax.core.hessian import unit
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.row_axis import ALL_HERE, RowAxis
from gptvq_jax.core.trellis_table import gaussian_levels
from gptvq_jax.core.trellis_tensor import (
    TrellisTensor,
    pack_outliers,
    pack_streams,
    table_values,
)
from gptvq_jax.methods import devices, uniform
from gptvq_jax.methods.trellis_budget import places_of, spend
from gptvq_jax.methods.trellis_settings import INT8, REFIT_STEPS, TrellisSettings
from gptvq_jax.moves.recode_streams import recode_streams
from gptvq_jax.moves.refit_levels import refit_levels
from gptvq_jax.moves.residual import residual_of
from gptvq_jax.moves.stream_column import Layout
from gptvq_jax.moves.sweep_streams import sweep_streams
from gptvq_jax.ops.viterbi import choose_search


def quantize(
    weight: jax.Array,
    hessian: jax.Array,
    hinv_chol: jax.Array,
    key: jax.Array,
    settings: TrellisSettings,
    *,
    mesh: Mesh | None = None,
) -> QuantizedTensor:
    """Codes a layer within `settings.bits` true bits per value, or keeps it in 8 bits.

    Args:
      weight: (R, C), dead columns already 0.
      hessian: (C, C) mean x x^T, undamped, in any unit.
      hinv_chol: (C, C) U of the damped Hessian, in any unit.
      key: not used: nothing is drawn.
      settings: of the method.
      mesh: several devices, of one axis, over which whole streams of rows are spread; what columns
        and levels share is found from all rows. What bits are spent on is found by one device.

    Raises:
      ValueError: the budget is below what is stored beside the codes.
    """
    in_8_bits = partial(uniform.gptq, weight, hessian, hinv_chol, key, settings.int8, mesh=mesh)
    if settings.form == INT8:
        return in_8_bits()
    rows, cols = weight.shape
    of_layer, rates = spend(weight, hinv_chol, settings)
    if of_layer.crowded:
        return in_8_bits()
    stream_rows = settings.rows_of_stream(rows)
    streams = -(-rows // stream_rows)
    own = weight, of_layer.outliers, of_layer.row_scales, jnp.ones(rows)
    shared = hessian, hinv_chol, jnp.asarray(rates, jnp.int32), settings.recode_passes
    shape = _shape_of(settings)
    if mesh is None:
        native = choose_search(settings.window_bits, stream_rows, streams)
        found = _code(*own, *shared, shape, stream_rows, native, ALL_HERE)
    else:
        found = _code_on(mesh, own, shared, shape, stream_rows)
    codes, scales, values, levels = found
    codes = np.asarray(codes).T.reshape(-1, stream_rows, cols)
    places = places_of(of_layer.outliers)
    gaps, added = pack_outliers(places, np.asarray(values).reshape(-1)[places])
    return TrellisTensor(
        codes=jnp.asarray(pack_streams(codes, rates)),
        rates=packing.pack(jnp.asarray(rates), 4),
        row_scales=of_layer.row_scales,
        col_scales=scales,
        levels=levels,
        outlier_gaps=jnp.asarray(gaps) if len(gaps) else None,
        outlier_values=jnp.asarray(added) if len(gaps) else None,
        rows=rows,
        cols=cols,
        stream_rows=stream_rows,
        window_bits=settings.window_bits,
    )


def _shape_of(settings: TrellisSettings) -> TrellisSettings:
    """Settings without the numbers that no program depends on."""
    return dataclasses.replace(settings, bits=2.0, recode_passes=1, outlier_limit="0")


def _code_on(mesh: Mesh, own, shared, settings: TrellisSettings, stream_rows: int):
    """What `_code` gives, by devices that have as many streams each, or one that is padding."""
    rows, cols = own[0].shape
    streams = -(-rows // stream_rows)
    mesh = devices.enough(mesh, streams)
    each = -(-streams // mesh.size)
    used = -(-streams // each)
    axis = RowAxis(mesh.axis_names[0], streams * stream_rows)
    native = choose_search(settings.window_bits, stream_rows, each)
    *own, ones = own
    weight, outliers, scales = (
        devices.cut_rows(x, used, each * stream_rows, fill)
        for x, fill in zip(own, (0, False, 1), strict=True)
    )
    own = weight, outliers, scales, devices.cut_rows(ones, used, each * stream_rows)
    static = settings, stream_rows, native, axis
    found = devices.run(_code, static, devices.first_of(mesh, used), own, shared)
    codes, scales, values, levels = zip(*found, strict=True)
    values = np.concatenate(values, axis=1)[:, :rows]
    return np.concatenate(codes, axis=1)[:, : streams * stream_rows], scales[0], values, levels[0]


@partial(jax.jit, static_argnames=("settings", "stream_rows", "native", "axis"))
def _code(
    weight,
    outliers,
    row_scales,
    used,
    hessian,
    hinv_chol,
    rates,
    passes,
    settings,
    stream_rows,
    native,
    axis,
):
    """Codes (C, R') uint8, column scales (C,), what outliers add (C, R), and levels or None.

    Args:
      used: (R,) 1, and 0 for rows that are padding already.
      stream_rows: T.
      axis: where more streams are.
    """
    rows, cols = weight.shape
    block = min(settings.block_size, cols)
    more_rows, more_cols = -rows % stream_rows, -cols % block

    def padded(x, value=0):
        return jnp.pad(x.T, ((0, more_cols), (0, more_rows)), constant_values=value)

    target, outliers = padded(weight), padded(outliers)
    scales = row_scales.astype(jnp.float32)
    levels = jnp.asarray(gaussian_levels(settings.num_levels)) if settings.num_levels else None
    layout = Layout(
        jnp.pad(scales, (0, more_rows), constant_values=1.0),
        jnp.pad(used, (0, more_rows)),
        table_values(settings.window_bits, levels),
        axis,
    )
    rates = jnp.pad(rates, (0, more_cols))
    options = {"stream_rows": stream_rows, "block_size": block, "native": native}
    chol = jax.scipy.linalg.block_diag(hinv_chol, jnp.eye(more_cols)) if more_cols else hinv_chol
    columns, quantized = sweep_streams(target, chol, rates, outliers, layout, **options)

    def polished(columns, levels):
        h = jnp.pad(hessian / unit(hessian), ((0, more_cols),) * 2)

        def one_pass(_, state):
            columns, residual, levels = state
            now = layout
            if levels is not None:
                levels, residual = refit_levels(
                    residual, h, levels, columns, rates, layout, REFIT_STEPS
                )
                now = layout._replace(table=table_values(settings.window_bits, levels))
            new = recode_streams(residual, h, columns, rates, outliers, now, **options)
            return *new, levels

        state = columns, residual_of(target, quantized, h), levels
        columns, _, levels = jax.lax.fori_loop(0, passes, one_pass, state)
        return columns, levels

    columns, levels = jax.lax.cond(passes > 0, polished, lambda *given: given, columns, levels)
    columns = jax.tree.map(lambda x: x[:cols], columns)
    codes = columns.windows & ((1 << rates[:cols, None]) - 1).astype(jnp.uint16)
    return codes.astype(jnp.uint8), columns.scale, columns.added[:, :rows], levels
