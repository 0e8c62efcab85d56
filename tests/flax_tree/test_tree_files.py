"""Trees with packed kernels, stored and read again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_models import WIDTH, normal
from orbax.checkpoint import v1 as ocp

import gptvq_jax
from gptvq_jax.flax_tree import load, packed, ready, save

RTN = "rtn"


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def tree():
    """Of two kinds of dense leaves, one matrix, and two matrices of one kernel."""
    rng = np.random.default_rng(0)
    params = {
        "mix": {"kernel": normal(rng, (8, 8)), "bias": normal(rng, 8)},
        "experts": normal(rng, (2, 8, 8)),
    }

    def function(params, x):
        x = x @ params["mix"]["kernel"] + params["mix"]["bias"]
        return jnp.einsum("ebd,edf->ebf", x, params["experts"])

    x = rng.normal(size=(2, 9, 8)).astype(np.float32)
    made = gptvq_jax.quantize(function, [x], [(".*", RTN)], params=params)
    return {**made, "more": {"scale": jnp.ones(3, jnp.bfloat16)}}


def test_a_tree_comes_back_as_it_was(tree, tmp_path):
    save(tmp_path / "tree", {"params": {"old": jnp.ones(2)}})
    save(tmp_path / "tree", tree)
    same(load(tmp_path / "tree"), tree)


@pytest.mark.parametrize("other", ["notes.txt", "tree/notes.txt"])
def test_files_of_other_kinds_are_never_replaced(other, tree, tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / other).write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt is of no tree, .*; name a new directory"):
        save(tmp_path, tree)
    assert (tmp_path / other).read_text() == "mine" and not (tmp_path / "kernels.json").exists()


def test_orbax_takes_it_too(tree, tmp_path):
    ocp.save(tmp_path / "tree", tree)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    same(ocp.load(tmp_path / "tree", jax.tree.map(like, tree)), tree)


class Dropping(nnx.Module):
    """Its state has more than parameters."""

    def __init__(self, rngs):
        rng = np.random.default_rng(0)
        self.inner = nnx.Linear(
            WIDTH, WIDTH, kernel_init=lambda key, *like: normal(rng, *like), rngs=rngs
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.inner(x))


def test_a_state_comes_back_into_that_of_its_model(tmp_path):
    model = Dropping(nnx.Rngs(0))
    model.eval()
    x = np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32)
    state = gptvq_jax.quantize(model, [x], [(".*", RTN)])
    with pytest.raises(ValueError, match=r"is (uint32|key<fry>), not one of .*nnx.filter_state"):
        save(tmp_path / "state", state)
    save(tmp_path / "state", nnx.filter_state(state, nnx.Param))
    found = load(tmp_path / "state", like=nnx.state(Dropping(nnx.Rngs(1))))
    run = jax.jit(packed(model, "reference"))
    np.testing.assert_array_equal(run(found, x), run(state, x))
    with pytest.raises(ValueError, match="like has no place for inner/"):
        load(tmp_path / "state", like={"outer": 0})


def test_what_is_for_running_alone_is_not_stored(tree, tmp_path):
    with pytest.raises(ValueError, match="kernel of flax_tree.ready; save the tree it was made of"):
        save(tmp_path / "tree", ready(tree, "reference"))


def test_a_damaged_tree_is_named(tree, tmp_path):
    directory = tmp_path / "tree"
    with pytest.raises(FileNotFoundError, match="tree holds no finished tree"):
        load(directory)
    save(directory, tree)
    whole = json.loads((directory / "kernels.json").read_text())
    name = "experts"
    for field, value in [
        ("shape", [2, 8, 9]),
        ("shape", "2"),
        ("in_axes", [0]),
        ("in_axes", [5]),
        ("batch_axes", []),
        ("dtype", "int8"),
        (None, None),
    ]:
        broken = json.loads(json.dumps(whole))
        if field is None:
            del broken["kernels"][name]
        else:
            broken["kernels"][name][field] = value
        (directory / "kernels.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"kernels\.json is damaged: .*; restore it"):
            load(directory)
    (directory / "kernels.json").write_text("{")
    with pytest.raises(ValueError, match=r"kernels\.json is damaged"):
        load(directory)
