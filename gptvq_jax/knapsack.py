"""The multiple-choice knapsack: one choice for each item, least loss within a budget of bytes."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag


def choose(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """The choice for every item that minimises the sum of losses; exact (branch and bound).

    Args:
      losses: of every choice of every item, at least 0.
      sizes: bytes, in the same order.
      budget: most bytes of all choices together.

    Raises:
      ValueError: even the smallest choices do not fit.
    """
    smallest = sum(min(of_item) for of_item in sizes)
    if smallest > budget:
        raise ValueError(f"the smallest choices take {smallest} bytes, the budget is {budget}")
    scale = max((max(of_item) for of_item in losses), default=0.0) or 1.0
    cost = np.concatenate([np.asarray(of_item, np.float64) / scale for of_item in losses])
    size = np.concatenate([np.asarray(of_item, np.float64) for of_item in sizes])
    one_each = block_diag([np.ones((1, len(of_item))) for of_item in losses])
    result = milp(
        cost,
        integrality=np.ones_like(cost),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size[None], -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if not result.success:
        raise ValueError(f"no allocation found: {result.message}")
    ends = np.cumsum([len(of_item) for of_item in losses])[:-1]
    chosen = [int(np.argmax(part)) for part in np.split(result.x, ends)]
    spent = sum(of_item[k] for of_item, k in zip(sizes, chosen, strict=True))
    if spent > budget:  # the solver's tolerance; not seen with sizes in whole bytes
        raise ValueError(f"the solver overspent its budget: {spent} of {budget} bytes")
    return chosen
