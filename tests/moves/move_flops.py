"""FLOP of every move on one device and on each of eight: a script that a test starts.

Prints a JSON object {move: FLOP of each device / FLOP of one}, by the compiler's count.
"""

import json
from functools import partial

import array_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gptvq_jax.core.grid import GroupGrid, over_devices
from gptvq_jax.core.mesh import AXIS, work_mesh
from gptvq_jax.core.row_axis import RowAxis
from gptvq_jax.core.trellis_table import gaussian_levels
from gptvq_jax.core.trellis_tensor import table_values
from gptvq_jax.methods.devices import first_of, program
from gptvq_jax.moves import nearest
from gptvq_jax.moves.em import GroupData, em
from gptvq_jax.moves.recode import recode
from gptvq_jax.moves.recode_streams import recode_streams
from gptvq_jax.moves.refit import decode, gradient_update, refit
from gptvq_jax.moves.refit_levels import refit_levels
from gptvq_jax.moves.reseed import reseed
from gptvq_jax.moves.residual import Residual
from gptvq_jax.moves.scales import normalize_strip, refit_row_scales
from gptvq_jax.moves.seed import SEEDS
from gptvq_jax.moves.stream_column import Column, Layout
from gptvq_jax.moves.sweep import sweep
from gptvq_jax.moves.sweep_streams import sweep_streams

ROWS, COLS, DIM, SIZE, BLOCK, TILE = 1024, 256, 2, 8, 16, 16
STRIPS = GroupGrid(ROWS, COLS, DIM, 64, 32)  # 16 x 8 groups
SHARED = GroupGrid(ROWS, COLS, DIM, ROWS, COLS)
LEVELS = 4  # bits of a window, and of a level


def _data(weight, grid):
    points = weight.reshape(COLS // DIM, DIM, 1, -1)
    whiten = jnp.broadcast_to(jnp.eye(DIM), (COLS // DIM, DIM, DIM))
    return GroupData(jnp.moveaxis(points, 2, 0), whiten, jnp.ones((1, COLS // DIM, grid.rows)))


def _books(grid):
    shape = (1, grid.col_strips, grid.row_strips, SIZE, DIM)
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) % 7


def _of_seed(name, weight, key, grid):
    return SEEDS[name](_data(weight, grid), SIZE, key[None], grid.axis)


def _em(weight, key, grid):
    return em(_data(weight, grid), _books(grid)[0, 0], 2, grid.axis)


def _sweep(weight, key, chol, grid):
    fit = lambda data, keys: _books(grid)[0, 0] + 0 * data.points[:, 0, 0, :1, None]  # noqa: E731
    swept = sweep(weight, chol, grid, fit, key, block_size=BLOCK)
    return swept.codes, swept.loss


def _recode(beam, error, image, codes, hessian, grid):
    found = Residual(error, image), hessian, _books(grid), codes, None, grid
    return recode(*found, beam=beam, block_size=BLOCK)


def _refit(error, image, codes, hessian, grid):
    return refit(Residual(error, image), hessian, _books(grid), codes, None, grid, 2)


def _adam(weight, codes, hessian, grid):
    reconstruct = lambda books: decode(books, codes, None, grid)  # noqa: E731
    options = dict(optimizer=optax.adam(0.1), iterations=2, axis=grid.axis, shared=grid.shared)
    return gradient_update(weight, hessian, _books(grid), reconstruct, **options)


def _reseed(error, image, codes, hessian, grid):
    scales = jnp.ones((COLS // DIM, grid.rows))
    return reseed(Residual(error, image), hessian, _books(grid), codes, scales, grid)


def _scales(weight, grid):
    found = normalize_strip(weight[:, None], 8, grid.axis)
    return found.codes, found.offset, found.step


def _row_scales(weight, error, image, grid):
    return refit_row_scales(Residual(error, image), Residual(weight, image), jnp.ones(grid.rows))


def _layout(grid):
    table = table_values(LEVELS, jnp.asarray(gaussian_levels(2**LEVELS)))
    ones = jnp.ones(grid.rows)
    return Layout(ones, ones, table, RowAxis(AXIS, ROWS))


OPTIONS = dict(stream_rows=TILE, block_size=BLOCK)
RATES = np.full(COLS, 2, np.int32)


def _columns(codes):
    zeros = jnp.zeros(codes.shape, jnp.float16)
    return Column(codes.astype(jnp.uint16), jnp.ones(COLS, jnp.float16), zeros)


def _sweep_streams(weight, outliers, chol, grid):
    return sweep_streams(weight, chol, jnp.asarray(RATES), outliers, _layout(grid), **OPTIONS)


def _recode_streams(error, image, windows, outliers, hessian, grid):
    given = Residual(error, image), hessian, _columns(windows), jnp.asarray(RATES), outliers
    return recode_streams(*given, _layout(grid), **OPTIONS)


def _refit_levels(error, image, windows, hessian, grid):
    levels = jnp.asarray(gaussian_levels(2**LEVELS))
    given = Residual(error, image), hessian, levels, _columns(windows), jnp.asarray(RATES)
    return refit_levels(*given, _layout(grid), 2)


# {move: (function, grid, names of arrays with rows, names of those that all devices have)}
MOVES = {
    "seed kmeans++": (partial(_of_seed, "kmeans++"), SHARED, "weight", "key"),
    "em": (_em, SHARED, "weight", "key"),
    "sweep": (_sweep, STRIPS, "weight", "key chol"),
    "recode": (partial(_recode, 1), STRIPS, "error image codes", "hessian"),
    "recode, beam": (partial(_recode, 3), STRIPS, "error image codes", "hessian"),
    "refit": (_refit, STRIPS, "error image codes", "hessian"),
    "refit, shared": (_refit, SHARED, "error image codes", "hessian"),
    "gradient update": (_adam, STRIPS, "weight codes", "hessian"),
    "gradient update, shared": (_adam, SHARED, "weight codes", "hessian"),
    "reseed": (_reseed, SHARED, "error image codes", "hessian"),
    "normalize": (_scales, SHARED, "weight", ""),
    "row scales": (_row_scales, SHARED, "weight error image", ""),
    "sweep of streams": (_sweep_streams, SHARED, "weight outliers", "chol"),
    "recode of streams": (_recode_streams, SHARED, "error image windows outliers", "hessian"),
    "refit of levels": (_refit_levels, SHARED, "error image windows", "hessian"),
}


def arrays() -> dict:
    problem = ref.problem(ROWS, COLS, seed=1)
    weight = np.asarray(problem.weight, np.float32).T
    return {
        "weight": weight,
        "error": 0.1 * weight,
        "image": 0.1 * weight,
        "codes": np.arange(COLS // DIM * ROWS, dtype=np.int32).reshape(1, -1, ROWS) % SIZE,
        "windows": np.arange(COLS * ROWS).reshape(COLS, ROWS) % 2**LEVELS,
        "outliers": np.zeros((COLS, ROWS), bool),
        "hessian": np.asarray(problem.hessian, np.float32),
        "chol": np.asarray(problem.hinv_chol, np.float32),
        "key": jax.random.key(0),
    }


def flop(move: str, mesh: Mesh) -> float:
    """Of a device."""
    function, grid, own, shared = MOVES[move]
    given = arrays()
    part, used = over_devices(grid, mesh.size, AXIS)
    assert used == mesh.size
    own = tuple(np.stack(np.split(given[name], used, axis=-1)) for name in own.split())
    shared = tuple(given[name] for name in shared.split())
    lowered = program.lower(function, (part,), mesh, own, shared)
    return lowered.compile().cost_analysis()["flops"]


if __name__ == "__main__":
    nearest._UNROLL = 4  # as in the fixture short_programs
    mesh = work_mesh()
    assert mesh.size == 8
    print(json.dumps({move: flop(move, mesh) / flop(move, first_of(mesh, 1)) for move in MOVES}))
