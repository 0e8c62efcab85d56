"""Second moments of what the layers of a model read, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from gptvq_jax.console.errors import first_line
from gptvq_jax.core.hessian import Moment, add_inputs, init_moment
from gptvq_jax.flax_tree.interpret import Reader, interpret
from gptvq_jax.flax_tree.layers import Found, Layer, candidates, find_layers

Moments = dict[str, list[Moment]]  # of every matrix of a layer


class Calibration:
    """A model and the batches that it is calibrated on.

    Args:
      function: of (tree, *inputs).
      tree: variables, dense.
      batches: each the input of the model, or a tuple of its inputs.
    """

    def __init__(self, function: Callable[..., Any], tree: Any, batches: Iterable[Any]):
        if isinstance(batches, jax.Array | np.ndarray | str | Mapping):
            raise ValueError(
                "calibration must be a list of batches, such as [x], not one "
                f"{type(batches).__name__}"
            )
        self._function, self._batches = function, batches
        self._weights = candidates(tree)
        self._step = jax.jit(self._add, static_argnames="layers", donate_argnames="moments")

    @property
    def again(self) -> bool:
        """Whether there are the same batches a second time."""
        return iter(self._batches) is not self._batches

    @property
    def count(self) -> int | None:
        """Of batches; None where nobody knows before the last."""
        return len(self._batches) if hasattr(self._batches, "__len__") else None

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """The inputs of every batch.

        Raises:
          ValueError: there is none, or one holds something else than arrays.
        """
        number = -1
        for number, batch in enumerate(self._batches):
            inputs = tuple(batch) if isinstance(batch, tuple) else (batch,)
            for leaf in jax.tree.leaves(inputs):
                if not isinstance(leaf, jax.Array | np.ndarray):
                    raise ValueError(
                        f"calibration batch {number} holds a {type(leaf).__name__}; a batch is an "
                        "array or a tuple of arrays, other arguments belong into a function"
                    )
            yield inputs
        if number < 0:
            raise ValueError("calibration has no batch; a generator can be gone through once only")

    def find(self, tree: Any, inputs: tuple[Any, ...]) -> Found:
        """The layers of the model, as the first batch reads them."""
        return _naming(0, inputs, lambda: find_layers(self._function, tree, inputs))

    def moments(
        self,
        tree: Any,
        layers: Mapping[str, Layer],
        first: tuple[Any, ...],
        rest: Iterator[tuple[Any, ...]],
        group: int | None = None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> Moments:
        """Sums over the first batch and the rest.

        Args:
          tree: variables, kernels as they are by now.
          layers: whose inputs are wanted.
          first, rest: batches.
          group: of the layers, to leave others' moments at 0; None: all.
          on_batch: called after each.
        """
        sums = {
            name: [init_moment(layer.layout.matrix[1]) for _ in range(layer.layout.count)]
            for name, layer in layers.items()
        }
        group = None if group is None else jnp.asarray(group)
        wanted = tuple(layers.values())
        number, inputs = 0, first
        while inputs is not None:
            step = partial(self._step, tree, sums, inputs, group, layers=wanted)
            sums = _naming(number, inputs, step)
            on_batch()
            number, inputs = number + 1, next(rest, None)
        return sums

    def _add(self, tree, moments, inputs, group, layers):
        leaves = jax.tree.leaves(tree)
        kernels = {weight.name: leaves[place] for place, weight in self._weights.items()}
        reader = _Adder(kernels, moments, {layer.name: layer.group for layer in layers}, group)
        interpret(self._function, (tree, *inputs), self._weights, reader)
        return reader.state


class _Adder(Reader):
    """Adds what layers read to their moments."""

    def __init__(
        self, kernels, moments: Moments, groups: Mapping[str, int], group: jax.Array | None
    ):
        self._kernels, self.state = kernels, moments
        self._groups, self._group = groups, group

    def kernel(self, name):
        return self._kernels[name]

    def product(self, product, dense):
        name = product.weight.name
        if name in self._groups:
            rows, sums = product.rows(), list(self.state[name])
            for row, index in enumerate(product.indices()):
                sums[index] = self._added(sums[index], rows[row], self._groups[name])
            self.state = {**self.state, name: sums}
        return dense()

    def _added(self, moment: Moment, rows: jax.Array, group: int) -> Moment:
        if self._group is None:
            return add_inputs(moment, rows)
        wanted = self._group == group
        return jax.lax.cond(wanted, add_inputs, lambda moment, _: moment, moment, rows)


def _naming(number: int, inputs: tuple[Any, ...], job: Callable[[], Any]) -> Any:
    """What the job gives, or which batch the model did not take."""
    try:
        return job()
    except (TypeError, ValueError, FlaxError) as error:
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(inputs))
        raise ValueError(
            f"the model does not take calibration batch {number}, {shapes}: {first_line(error)}; "
            "a batch is the model's input, or a tuple of its inputs"
        ) from error
