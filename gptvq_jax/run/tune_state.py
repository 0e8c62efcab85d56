"""What a tuning of the whole model goes on from after a kill: a directory that is whole or absent.

state-00000007-00000120/    a stored tree (storage/tree_io.py), the seventh, of step 120; those
                            before it go when it is there

Parameters and the moments of AdamW are float32 and come back to the last bit.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from gptvq_jax.run.student import States
from gptvq_jax.storage.tree_io import damage, is_stored, load_tree, save_tree


@dataclasses.dataclass
class Place:
    """Where a tuning is.

    Attributes:
      step: steps done.
      states: after them.
      best: the states with the least divergence on the windows held out; `lowest` is theirs, and
        `best_step` where they were.
      good, good_step: where the windows were last looked at; a step that is not finite leads back.
      stale: looks in a row that gained too little.
      tries: how often a step was not finite.
      rate: the share of the learning rates that is left after that.
      stopped: early.
    """

    step: int
    states: States
    best: States
    good: States
    lowest: float
    best_step: int = 0
    good_step: int = 0
    stale: int = 0
    tries: int = 0
    rate: float = 1.0
    stopped: bool = False


_NUMBERS = (
    *("step", "lowest", "best_step", "good_step", "stale", "tries", "rate", "stopped"),
)  # all of them exact in float32
_STATES = ("states", "best", "good")


def save(directory: Path, place: Place) -> None:
    """Writes a place; the last one stays until that is done.

    Raises:
      FullDiskError: there is no room.
    """
    tree: dict[str, Any] = {name: _joined(getattr(place, name)) for name in _STATES}
    tree["numbers"] = np.asarray([getattr(place, name) for name in _NUMBERS], np.float32)
    number = _last_number(directory) + 1
    others = list(directory.glob("state-*"))
    save_tree(directory / f"state-{number:08d}-{place.step:08d}", tree, "float32")
    for other in others:
        shutil.rmtree(other)


def load(directory: Path, start: States) -> Place | None:
    """The last place that was written, or None.

    Args:
      directory: of `save`.
      start: states of the shapes that it has.
    """
    for path in reversed(_stored(directory)):
        wrong = damage(path)
        if wrong:
            logging.warning("the tuning goes on from an earlier state: %s", wrong.partition(";")[0])
            continue
        tree, _ = load_tree(path)
        kinds = {field.name: type(field.default) for field in dataclasses.fields(Place)}
        kinds |= {"step": int, "lowest": float}
        numbers = {
            name: kinds[name](value)
            for name, value in zip(_NUMBERS, tree["numbers"].tolist(), strict=True)
        }
        return Place(**{n: _parted(tree[n], start) for n in _STATES}, **numbers)
    return None


def _last_number(directory: Path) -> int:
    """Of the places that were written, or -1."""
    return max((int(p.name.split("-")[1]) for p in directory.glob("state-*")), default=-1)


def last_step(directory: Path) -> int:
    """That of the last place, or -1."""
    whole = [path for path in _stored(directory) if not damage(path)]
    return int(whole[-1].name.rpartition("-")[2]) if whole else -1


def _stored(directory: Path) -> list[Path]:
    """Of all places that were written to their end, in order."""
    return [path for path in sorted(directory.glob("state-*")) if is_stored(path)]


def _joined(states: States) -> np.ndarray:
    """All arrays in one: Orbax takes a file for each."""
    return np.concatenate([np.ravel(np.asarray(a, np.float32)) for a in jax.tree.leaves(states)])


def _parted(joined: np.ndarray, start: States) -> States:
    leaves, structure = jax.tree.flatten(start)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = np.split(joined, ends[:-1])
    return jax.tree.unflatten(
        structure,
        [
            jnp.asarray(part.reshape(leaf.shape).astype(leaf.dtype))
            for part, leaf in zip(parts, leaves, strict=True)
        ],
    )
