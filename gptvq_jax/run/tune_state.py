"""What a tuning of the whole model goes on from after a kill: a directory that is whole or absent.

state-00000007-00000120/    a stored tree (storage/tree_io.py), the seventh, of step 120; those
                            before it go when it is there

Parameters and the moments of AdamW are float32 and come back to the last bit. Where codes have been
chosen again their bytes are there too, those that the best states share with the states once; the
good states have those of the states, for codes change at looks alone.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from gptvq_jax.methods.leaf_codes import count_bytes, from_bytes, to_bytes
from gptvq_jax.methods.trainable import Unpacked
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
      codes_part: the part of codes_share and codes_trust that is left after codes were reverted.
      recoded, kept: how often codes were chosen again, and how often that was kept.
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
    codes_part: float = 1.0
    recoded: int = 0
    kept: int = 0


_NUMBERS = (
    *("step", "lowest", "best_step", "good_step", "stale", "tries", "rate", "stopped"),
    *("codes_part", "recoded", "kept"),
)  # all of them exact in float32
_STATES = ("states", "best", "good")
_SHARED, _NOW, _BEST = "shared_codes", "codes", "best_codes"
Codes = dict[str, jax.Array]  # by leaf


def save(directory: Path, place: Place, leaves: Mapping[str, Unpacked]) -> None:
    """Writes a place; the last one stays until that is done.

    Args:
      directory: of all places.
      place: to be written.
      leaves: what the states are of.

    Raises:
      FullDiskError: there is no room.
    """
    tree: dict[str, Any] = {name: _joined(getattr(place, name)) for name in _STATES}
    for name, codes in _chosen_again(place).items():
        tree |= {name: _as_floats(leaves, codes), f"{name}_of": _which(place.states, codes)}
    tree["numbers"] = np.asarray([getattr(place, name) for name in _NUMBERS], np.float32)
    number = _last_number(directory) + 1
    others = list(directory.glob("state-*"))
    save_tree(directory / f"state-{number:08d}-{place.step:08d}", tree, "float32")
    for other in others:
        shutil.rmtree(other)


def _chosen_again(place: Place) -> dict[str, Codes]:
    """Codes in place of those of the leaves, by their names in the tree; no name for none.

    Of the best states, those that are not the states' own: "shared_codes" are theirs too.
    """
    now, best = ({n: s.codes for n, s in of.items()} for of in (place.states, place.best))
    now = {name: codes for name, codes in now.items() if codes is not None}
    best = {name: codes for name, codes in best.items() if codes is not None}
    shared = {name: codes for name, codes in best.items() if codes is now.get(name)}
    found = {
        _SHARED: shared,
        _NOW: {name: codes for name, codes in now.items() if name not in shared},
        _BEST: {name: codes for name, codes in best.items() if name not in shared},
    }
    return {name: codes for name, codes in found.items() if codes}


def _which(states: States, codes: Codes) -> np.ndarray:
    """1 for each of the leaves that has codes here, in order; 0 for the others."""
    return np.asarray([name in codes for name in sorted(states)], np.float32)


def _as_floats(leaves: Mapping[str, Unpacked], codes: Codes) -> np.ndarray:
    """Three bytes of codes in a float32, which 24 bits fit without rounding."""
    stored = np.concatenate([to_bytes(leaves[name], codes[name]) for name in sorted(codes)])
    three = np.pad(stored, (0, -len(stored) % 3)).reshape(-1, 3).astype(np.int32)
    return (three @ np.array([1, 1 << 8, 1 << 16], np.int32)).astype(np.float32)


def _from_floats(leaves: Mapping[str, Unpacked], names: Sequence[str], floats) -> Codes:
    three = floats.astype(np.int32)[:, None] >> np.array([0, 8, 16], np.int32)
    stored, found, start = (three & 255).astype(np.uint8).reshape(-1), {}, 0
    for name in names:
        count = count_bytes(leaves[name])
        found[name] = from_bytes(leaves[name], stored[start : start + count])
        start += count
    return found


def _with_codes(states: States, codes: Codes) -> States:
    return {name: state._replace(codes=codes.get(name)) for name, state in states.items()}


def load(directory: Path, start: States, leaves: Mapping[str, Unpacked]) -> Place | None:
    """The last place that was written, or None.

    Args:
      directory: of `save`.
      start: states of the shapes that it has, with the codes of the leaves.
      leaves: as `save` takes them.
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
        codes: dict[str, Codes] = {_SHARED: {}, _NOW: {}, _BEST: {}}
        for kind in codes.keys() & tree.keys():
            there = zip(sorted(start), tree[f"{kind}_of"], strict=True)
            names = [name for name, is_there in there if is_there]
            codes[kind] = _from_floats(leaves, names, tree[kind])
        now, best = (codes[_SHARED] | codes[kind] for kind in (_NOW, _BEST))
        states = {
            name: _with_codes(_parted(tree[name], start), best if name == "best" else now)
            for name in _STATES
        }
        return Place(**states, **numbers)
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
    """All arrays but codes in one: Orbax takes a file for each."""
    arrays = jax.tree.leaves(_with_codes(states, {}))
    return np.concatenate([np.ravel(np.asarray(a, np.float32)) for a in arrays])


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
