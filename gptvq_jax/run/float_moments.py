"""Second moments of what all layers of a block read in the float model, kept for several runs.

With `calibration.inputs='float'`, and without `true_sequential`, they depend on nothing that is
quantized: runs on the same text may share them. A run that finds them in its work directory does
not add them up again.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptvq_jax.config import RunSettings
from gptvq_jax.console.errors import first_line
from gptvq_jax.core.hessian import Moment
from gptvq_jax.files import durable
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.flops import stage_flops
from gptvq_jax.models.llama import Params
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.models.stages import expert_of
from gptvq_jax.run import forward, token_weights
from gptvq_jax.run.calibrate import (
    LAST,
    Moments,
    Owner,
    moment_flops,
)
from gptvq_jax.run.context import Context
from gptvq_jax.run.held_out import Files, Sums, init_sums, run_windows
from gptvq_jax.run.workdir import WorkDir

_FOLDER = "moments"


class FloatMoments:
    """A visitor of the blocks, upwards: writes the moments of each.

    It reads the float model's stream, which is there already, and token weights where
    `calibration.gradient_groups` asks for them.

    Args:
      context: of the run.
      blocks: how many are wanted, from the first.
      keep_float: whether another pass reads the float model's stream later.
    """

    def __init__(self, context: Context, blocks: int, keep_float: bool = True):
        self._context, self._blocks = context, blocks
        self.files = context.files
        self.releases = () if keep_float else (forward.STREAM,)

    def position(self, order: range) -> int:
        """Up to the first block without moments."""
        missing = (i for i in order[: self._blocks] if not _path(self._context.workdir, i).exists())
        return next(missing, len(order))

    def begin(self) -> None:
        """There is nothing to begin with."""

    def visit(self, index: int, block: Params) -> None:
        """See Visitor."""
        if index >= self._blocks:
            return
        source, settings, workdir, _, stopwatch = self._context
        c, weights, config = settings.calibration, None, source.config.of_block(index)
        with stopwatch.stage("hessians"):
            if c.gradient_groups:
                loaded, how = workdir.load_token_weights(index), (c.gradient_power, c.num_windows)
                weights = token_weights.relative(config, loaded, *how)
            x = self.files.read(forward.STREAM, index)
            of_sums = dict(held_out=c.held_out > 0, products=c.products)
            sums = init_sums(config, block, range(LAST), weights, **of_sums)
            stopwatch.flops(
                stage_flops(config, range(LAST - 1), *x.shape[:2])
                + moment_flops(config, sums.fitted, x.shape[0] * x.shape[1])
            )
            parts = config, block, Files(x), 0, LAST - 1, sums, c, weights
            save_sums(workdir, index, jax.block_until_ready(run_windows(*parts)))


def to_arrays(sums: Sums) -> dict[str, np.ndarray]:
    """Sums of inputs by name; float moments have no others. See `from_arrays`."""
    arrays = {}
    for kind, moments in sums._asdict().items():
        for (name, group), moment in moments.inputs.items():
            arrays[f"{kind} {name} {group} total"] = np.asarray(moment.total)
            arrays[f"{kind} {name} {group} count"] = np.asarray(moment.count)
            if (name, group) in moments.tokens:
                tokens = moments.tokens[name, group]
                arrays[f"{kind} {name} {group} tokens"] = np.asarray(tokens)
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Sums:
    """What `to_arrays` was given.

    Raises:
      ValueError, KeyError: they are others.
    """
    inputs: dict[str, dict[Owner, Moment]] = {kind: {} for kind in Sums._fields}
    tokens: dict[str, dict[Owner, jax.Array]] = {kind: {} for kind in Sums._fields}
    for key in [key for key in arrays if key.endswith(" total")]:
        kind, name, group, _ = key.split(" ")
        parts = arrays[key], arrays[f"{kind} {name} {group} count"]
        inputs[kind][name, int(group)] = Moment(*map(jnp.asarray, parts))
        if expert_of(name) is not None:
            count = jnp.asarray(arrays[f"{kind} {name} {group} tokens"])
            tokens[kind][name, int(group)] = count
    return Sums(*(Moments(inputs[kind], {}, tokens[kind]) for kind in Sums._fields))


def save_sums(workdir: WorkDir, index: int, sums: Sums) -> None:
    """Writes those of a block."""
    arrays = to_arrays(sums)
    size = sum(array.nbytes for array in arrays.values())
    writing = durable.replacing(_path(workdir, index), size)
    with writing as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def load_sums(workdir: WorkDir, index: int) -> Sums | None:
    """Those of a block, or None where nobody has made them.

    Raises:
      ValueError: the file is damaged.
    """
    path = _path(workdir, index)
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return from_arrays(arrays)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({first_line(error)}); remove {path.parent} and give the same "
            "command again"
        ) from error


def moments_bytes(config: ModelConfig, settings: RunSettings) -> int:
    """Of the file of one block with this config, without its headers."""
    shapes, c = layer_shapes(config), settings.calibration
    groups, kinds = c.gradient_groups, 1 + (c.held_out > 0)
    firsts = config.linear_layers if groups else [group[0] for group in config.linear_groups]
    return kinds * sum(4 * shapes[name][1] ** 2 * (groups or 1) for name in firsts)


def _path(workdir: WorkDir, index: int) -> Path:
    return workdir.path / _FOLDER / f"{index:05d}.npz"
