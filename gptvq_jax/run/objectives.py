"""What the rows of a layer minimise, from the moments of what it reads (calibrate.py)."""

import itertools
from collections.abc import Collection

import jax
import jax.numpy as jnp

from gptvq_jax.core import flops
from gptvq_jax.core.hessian import factorize, mean, mean_product
from gptvq_jax.methods.layer import Objective
from gptvq_jax.methods.pool import parallel
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.run import expert_moments
from gptvq_jax.run.calibrate import Moments, Owner, closes


def expert_shares(moments: Moments, least: int) -> dict[Owner, float]:
    """How much of the Hessian of all experts each expert's owner takes; see expert_moments.py."""
    return expert_moments.shares(moments.tokens, moments.inputs, least)


def hessians(
    moments: Moments, least: int = 1, wanted: Collection[Owner] | None = None
) -> dict[Owner, jax.Array]:
    """Mean w y y^T by owner, (C, C).

    Args:
      moments: of all windows.
      least: tokens that an expert needs for one of its own (calibration.expert_tokens); 1: those
        that none reached have that of all experts.
      wanted: owners; None: all.
    """
    owners = moments.inputs if wanted is None else dict.fromkeys(wanted)
    return expert_moments.blended(moments.inputs, expert_shares(moments, least), owners)


def objectives(
    moments: Moments,
    damping: float,
    name: str,
    least: int = 1,
    wanted: Collection[Owner] | None = None,
) -> dict[Owner, Objective]:
    """By owner, its Hessian and the factor; without a shift.

    Args:
      moments: of all windows.
      damping: of `hessian.factorize`.
      name: of the block, for messages.
      least, wanted: of `hessians`.
    """
    found = hessians(moments, least, wanted)
    factors = parallel(lambda owner: factorize(found[owner], damping, f"{name}/{owner[0]}"), found)
    pairs = zip(found.values(), factors, strict=True)
    return dict(zip(found, itertools.starmap(Objective, pairs), strict=True))


def factor_flops(moments: Moments) -> float:
    """Of `objectives`."""
    return sum(flops.inverse_cholesky(m.total.shape[0]) for m in moments.inputs.values())


def shift(
    config: ModelConfig,
    moments: Moments,
    owner: Owner,
    weight: jax.Array,
    hessian: jax.Array,
    least: int = 1,
) -> jax.Array:
    """S of `hessian.asymmetric_target` for the rows (R, C) of an owner.

    Args:
      config: of the block.
      moments: of all windows.
      owner, weight: of the rows.
      hessian: theirs. Of an expert its own counts, for as much as `hessians` takes of it: in what
        it takes of others nothing differs.
      least: of `hessians`.
    """
    name, _ = owner
    cross = mean_product(moments.crosses[owner])
    if owner in moments.tokens:
        own = 1 - expert_moments.share(moments.tokens[owner], weight.shape[1], least)
        difference = cross - mean(moments.inputs[owner])
        return own * jnp.matmul(weight, difference, precision="highest")
    if closes(config, config.layers.stage_of[name]):
        return cross - jnp.matmul(weight, hessian, precision="highest")
    return jnp.matmul(weight, cross - hessian, precision="highest")
