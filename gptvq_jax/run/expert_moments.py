"""Second moments of what experts read, each of the tokens that the router sends to it.

A block adds sum_e p_te f_e(x_t) for token t over its experts e (models/experts.py). With the routes
held, an error d in the outputs of the last layer of expert e moves that by p_te d, and an error in
its first ones by p_te times a derivative that, as in any layer, is taken for a constant. So the
errors of a layer of expert e count as

    mean over the tokens t of e of p_te^2 |(W - Q) y_t|^2 = tr((W - Q) H_e (W - Q)^T),

    H_e = sum p_te^2 y_t y_t^T / sum p_te^2,

errors of different experts being taken as uncorrelated. The y_t are what the expert itself reads:
of its last layer, its own inner activations. A squared gradient with respect to the outputs of an
expert (gradients.py) has p_te^2 in it already, and takes its place.

An expert that got n tokens, fewer than m (by default as many as its layer has inputs, below which
H_e is singular), has

    n / m H_e + (1 - n / m) H,    H = sum over all experts of sum p^2 y y^T / sum of all p^2,

which is H alone where no token reached it. Of the first layers H is the block's second moment; the
inner activations of different experts have no axes in common, and their H has little beside a
diagonal, which says how large they are.

Costs:
  flops: those of a token's k experts, and what fills up the last step of each expert's rows.
  memory: a moment of 4 C^2 bytes for every expert, as many again for windows that are held out, and
    for an asymmetric target. A stage of Qwen3-30B-A3B has 128 of 2048^2: 2.1 GB. Of Mixtral-8x7B
    the last has 8 of 14336^2: 6.6 GB. Activations are those of k experts a token.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptvq_jax.console.layer_kind import layer_kind
from gptvq_jax.core.hessian import Moment, add_inputs, add_products, mean
from gptvq_jax.models.stages import expert_of

_ROWS = 256  # that are added to a moment at a time

Owner = tuple[str, int]  # as in calibrate.py


class Sorted(NamedTuple):
    """Slots by expert."""

    order: jax.Array  # (S + rows,) int32; what follows the last slot is never counted
    starts: jax.Array  # (experts,) of each in the order
    sizes: jax.Array  # (experts,)
    rows: int


def sort_slots(experts: jax.Array, count: int) -> Sorted:
    """Of slots with experts (S,), of `count` experts."""
    rows = min(_ROWS, len(experts))
    sizes = jnp.bincount(experts, length=count)
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    return Sorted(jnp.pad(order, (0, rows)), starts, sizes, rows)


def add_slots(
    slots: Sorted,
    number: int,
    moment: Moment,
    inputs: jax.Array,
    weights: jax.Array,
    cross: Moment | None = None,
    other: jax.Array | None = None,
) -> tuple[Moment, Moment | None]:
    """Adds what an expert reads; the work is that of its slots, filled up to `rows`.

    Args:
      slots: of a batch.
      number: of the expert.
      moment: of its inputs.
      inputs: (..., T, in) of tokens, or (..., T, k, in) of slots.
      weights: of slots (..., T, k).
      cross: its moment with `other`, or None.
      other: in the shape of `inputs`.
    """
    weights, width = weights.reshape(-1), inputs.shape[-1]
    inputs = inputs.reshape(-1, width)
    other = None if other is None else other.reshape(-1, width)
    shared = len(weights) // len(inputs)  # slots that read one row

    def add(step: jax.Array, sums: Any) -> Any:
        first = step * slots.rows
        of_step = lax.dynamic_slice_in_dim(slots.order, slots.starts[number] + first, slots.rows)
        counts = first + jnp.arange(slots.rows) < slots.sizes[number]
        weight, row = jnp.where(counts, weights[of_step], 0.0), of_step // shared
        moment, cross = sums
        if cross is not None:
            cross = add_products(cross, other[row], inputs[row], weight)
        return add_inputs(moment, inputs[row], weight), cross

    return lax.fori_loop(0, -(-slots.sizes[number] // slots.rows), add, (moment, cross))


def shares(
    tokens: Mapping[Owner, jax.Array], inputs: Mapping[Owner, Moment], least: int
) -> dict[Owner, float]:
    """How much of the Hessian of all experts each owner that is one's takes.

    Args:
      tokens: that experts got.
      inputs: their moments.
      least: m, the tokens that are enough; 0: as many as a layer has inputs.
    """
    return {
        owner: share(count, inputs[owner].total.shape[0], least) for owner, count in tokens.items()
    }


def share(tokens: jax.Array, cols: int, least: int) -> float:
    """Of an expert that got so many tokens, for a layer with so many inputs."""
    return max(0.0, 1 - int(tokens) / (least or cols))


def blended(
    inputs: Mapping[Owner, Moment], part: Mapping[Owner, float], wanted: Iterable[Owner]
) -> dict[Owner, jax.Array]:
    """Hessians (C, C) of some owners, those of experts blended as `shares` says."""
    found = {owner: mean(inputs[owner]) for owner in wanted}
    of_all: dict[Owner, jax.Array] = {}
    for owner in found:
        of_owner = part.get(owner, 0.0)
        if not of_owner:
            continue
        key = layer_kind(owner[0]), owner[1]
        if key not in of_all:
            members = [of for of in part if (layer_kind(of[0]), of[1]) == key]
            total = sum(inputs[of].total for of in members)
            of_all[key] = mean(Moment(total, sum(inputs[of].count for of in members)))
        found[owner] = (1 - of_owner) * found[owner] + of_owner * of_all[key]
    return found


def few_tokens(
    tokens: Mapping[Owner, jax.Array], part: Mapping[Owner, float], name: str
) -> str | None:
    """One line on the experts of a block that take of others' Hessians; None: there are none."""
    counts = {expert_of(owner[0]): int(count) for owner, count in tokens.items()}
    few = {expert_of(owner[0]) for owner, of_owner in part.items() if of_owner}
    if not few:
        return None
    none = sorted(number for number in few if not counts[number])
    text = (
        f"{name}: {len(few)} of {len(counts)} experts got too few calibration tokens for Hessians "
        "of their own, and share in the block's"
    )
    if none:
        text += f"; no token reached {', '.join(map(str, none))}"
    return text + "; raise calibration.num_windows"
