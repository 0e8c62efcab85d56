"""Flax models quantized by rules: what is calibrated, what comes out, and that it runs packed."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx
from flax_models import LAYERS, WIDTH, Mixer, Net, images, net, variables_of

import gptvq_jax
from gptvq_jax.core.hessian import mean
from gptvq_jax.core.int8_rows import check_int8_rows
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import FactoredCodebook, VQTensor
from gptvq_jax.flax_tree import PackedKernel, bits_per_value, dequantize, packed, ready
from gptvq_jax.flax_tree.calibrate import Calibration
from gptvq_jax.flax_tree.kernel import is_packed
from gptvq_jax.flax_tree.models import as_function, layer_name, named_leaves

pytestmark = pytest.mark.usefixtures("short_programs")
GPTQ = {"method": "gptq", "bits": 1}  # so coarse that later layers differ
RTN = {"method": "rtn", "bits": 4, "group_size": 0}
VQ = {"dim": 2, "bits": 1.5, "seed": "random", "codebook_update": "none", "polish_rounds": 0}


@pytest.fixture(scope="module")
def quantized():
    """A Linen model with layers of three kinds, its variables, and those with packed kernels."""
    model, variables = net()
    rules = [("head", "dense"), ("block/attention/.*", GPTQ), (".*", RTN)]
    return model, variables, gptvq_jax.quantize(model, images(), rules, params=variables)


def kernels(tree):
    return {layer_name(name): leaf for name, leaf in named_leaves(tree) if is_packed(leaf)}


def assert_runs_packed(model, tree, inputs, implementation="reference"):
    """The packed tree gives what the dense one gives, in a compiled program."""
    found = jax.jit(packed(model, implementation))(tree, *inputs)
    dense = jax.jit(dequantize)(tree)
    expected = jax.jit(as_function(model))(dense, *inputs)
    size = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * size), found, expected)


def test_rules_say_what_becomes_of_which_layer(quantized):
    _, variables, tree = quantized
    found = kernels(tree)
    assert set(found) == {*LAYERS} - {"head"}
    for name, kernel in found.items():
        (tensor,) = kernel.tensors
        assert isinstance(tensor, VQTensor)
        assert tensor.index_bits == (1 if name.startswith("block/attention/") else 4)
    before = dict(named_leaves(variables))
    for name, leaf in named_leaves(tree):
        if is_packed(leaf):
            assert (leaf.shape, leaf.dtype) == (before[name].shape, before[name].dtype)
        else:
            assert leaf is before[name]


def test_a_model_runs_from_packed_kernels(quantized):
    model, variables, tree = quantized
    assert_runs_packed(model, tree, images(1))
    (kernel,) = (leaf for leaf in kernels(tree).values() if leaf.shape == (2, 2, 2, WIDTH))
    assert kernel.layout.in_axes == (0, 1, 2) and kernel.layout.matrix == (WIDTH, WIDTH)


def test_a_tree_made_ready_gives_the_same(quantized):
    _, _, tree = quantized
    mix = {"mix": tree["params"]["mix"]["kernel"]}
    function = lambda tree, x: x @ tree["mix"]  # noqa: E731
    x = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)
    found = jax.jit(packed(function))(ready(mix, "xla"), x)
    np.testing.assert_array_equal(found, jax.jit(packed(function, "xla"))(mix, x))
    np.testing.assert_allclose(found, x @ jax.jit(dequantize)(mix)["mix"], atol=1e-5)


def test_a_packed_model_takes_what_apply_takes(quantized):
    model, _, tree = quantized
    run = partial(packed(model, "reference"), mutable=["intermediates"], capture_intermediates=True)
    _, collected = jax.eval_shape(run, tree, images()[0])
    shared = collected["intermediates"]["block"]["shared"]["__call__"]
    assert [x.shape for x in shared] == [(6, 4, WIDTH)] * 2


def test_a_packed_tree_is_small(quantized):
    """What the program is given: codes and codebooks, and no kernel beside them."""
    _, variables, tree = quantized
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(t)) for t in (tree, variables)]
    expected = sum(kernel.num_bytes - 4 * kernel.num_values for kernel in kernels(tree).values())
    assert sizes[0] - sizes[1] == expected < 0


def dense_inputs(model, variables, batches):
    """What every Dense, DenseGeneral and Einsum reads, rows x columns, by Flax's interceptor."""

    @jax.jit
    def reads(variables, batch):
        read = {}

        def keep(call, args, options, context):
            if context.method_name == "__call__" and isinstance(
                context.module, nn.Dense | nn.DenseGeneral | nn.Einsum
            ):
                name = "/".join(context.module.path)
                read.setdefault(name, []).append(args[0])
            return call(*args, **options)

        with nn.intercept_methods(keep):
            model.apply(variables, batch)
        return read

    found = [reads(variables, batch) for batch in batches]
    return {
        name: np.concatenate([np.reshape(x, (-1, WIDTH)) for read in found for x in read[name]])
        for name in found[0]
    }


def test_hessians_are_those_of_what_modules_read():
    model, variables = net()
    batches = images(3)
    work = Calibration(model.apply, variables, batches)
    found = work.find(variables, (batches[0],))
    assert set(found.layers) == set(LAYERS) and not found.unread
    added = {"positions", *(f"block/attention/{n}/bias" for n in ("query", "key", "value"))}
    assert found.passed_over == dict.fromkeys(added, "add reads it, not a product alone")
    given = ((batch,) for batch in batches)
    sums = work.moments(variables, found.layers, next(given), given)
    expected = dense_inputs(model, variables, batches)
    assert set(expected) == {*LAYERS} - {"patches"}
    for name, rows in expected.items():
        (moment,) = sums[name]
        assert float(moment.count) == len(rows)  # of both calls of the shared one
        np.testing.assert_allclose(mean(moment), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    count = 3 * 6 * 2 * 2
    assert float(sums["patches"][0].count) == count and sums["patches"][0].total.shape == (8, 8)


def test_quantized_inputs_are_those_of_the_layers_before():
    model, variables = net()
    rule = [("block/shared|mix", GPTQ)]
    trees = {
        inputs: gptvq_jax.quantize(model, images(), rule, params=variables, inputs=inputs)
        for inputs in ("float", "quantized")
    }
    found = {inputs: kernels(tree) for inputs, tree in trees.items()}
    same = lambda name: jax.tree.all(  # noqa: E731
        jax.tree.map(np.array_equal, *(of[name] for of in found.values()))
    )
    assert same("block/shared") and not same("mix")
    halfway = jax.jit(dequantize)({"params": trees["float"]["params"]})
    halfway["params"]["mix"] = variables["params"]["mix"]
    again = gptvq_jax.quantize(model, images(), [("mix", GPTQ)], params=halfway)
    jax.tree.map(np.testing.assert_array_equal, kernels(again)["mix"], found["quantized"]["mix"])


def test_an_nnx_model_gives_its_state():
    model = Mixer(nnx.Rngs(0))
    model.eval()
    batches = [batch.reshape(6, 4, WIDTH) for batch in images()]
    tree = gptvq_jax.quantize(model, batches, [(".*", GPTQ)])
    assert isinstance(tree, nnx.State)
    names = {"inner", "head", *(f"attention/{n}" for n in ("query", "key", "value", "out"))}
    assert set(kernels(tree)) == names
    assert_runs_packed(model, tree, batches[:1])
    dense = jax.jit(dequantize)(tree)
    nnx.update(model, dense)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(nnx.filter_state(of, nnx.Param) for of in (nnx.state(model), dense)),
    )


class Stack(nn.Module):
    """Layers behind one another, in a loop over stacked kernels; recomputed in gradients."""

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(nn.Dense)
        scanned = nn.scan(
            lambda module, x, _: (jnp.tanh(module(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scanned(layer(WIDTH, name="layers"), x, None)[0]


class Apart(nn.Module):
    """The same layers with a kernel each."""

    @nn.compact
    def __call__(self, x):
        for index in range(3):
            x = jnp.tanh(nn.Dense(WIDTH, name=f"layers_{index}")(x))
        return x


def test_stacked_layers_have_a_matrix_each():
    model, batches = Stack(), [batch.reshape(-1, WIDTH) for batch in images()]
    variables = variables_of(model, batches[0])
    tree = gptvq_jax.quantize(model, batches, [("layers", GPTQ)], params=variables)
    (kernel,) = kernels(tree).values()
    assert kernel.shape == (3, WIDTH, WIDTH) and len(kernel.tensors) == 3
    assert_runs_packed(model, tree, batches[:1])
    one = {
        f"layers_{i}": {name: leaf[i] for name, leaf in variables["params"]["layers"].items()}
        for i in range(3)
    }
    alone = gptvq_jax.quantize(Apart(), batches, [(".*", GPTQ)], params={"params": one})
    found, expected = (jax.jit(dequantize)(of)["params"] for of in (tree, alone))
    for i in range(3):
        of_one = expected[f"layers_{i}"]["kernel"]
        np.testing.assert_allclose(found["layers"]["kernel"][i], of_one, atol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "rtn", "bits": 3, "group_size": 0},
        pytest.param(
            {"method": "trellis", "bits": 4.0, "window_bits": 4, "recode_passes": 0},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_function_of_arrays_is_a_model_too(rule):
    """Experts in an einsum, in bfloat16."""
    rng = np.random.default_rng(0)
    outputs = 32 if rule["method"] == "trellis" else WIDTH
    params = {"experts": jnp.asarray(rng.normal(size=(2, WIDTH, outputs)), jnp.bfloat16)}
    function = lambda params, x: jnp.einsum("ebd,edf->ebf", x, params["experts"])  # noqa: E731
    x = jnp.asarray(rng.normal(size=(2, 20, WIDTH)), jnp.bfloat16)
    tree = gptvq_jax.quantize(function, [x], [("experts", rule)], params=params)
    kernel = tree["experts"]
    kind = TrellisTensor if rule["method"] == "trellis" else VQTensor
    assert [type(tensor) for tensor in kernel.tensors] == [kind] * 2
    dense = jax.jit(dequantize)(tree)["experts"]
    assert (dense.shape, dense.dtype) == ((2, WIDTH, outputs), jnp.bfloat16)
    y = jax.jit(packed(function, "reference"))(tree, x)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(jax.jit(function)({"experts": dense}, x), np.float32)
    error = np.abs(np.asarray(y, np.float32) - expected)
    assert error.max() < 0.03 * np.abs(expected).max()


@pytest.mark.slow
def test_vectors_are_like_other_codes():
    model, variables = net()
    tree = gptvq_jax.quantize(model, images(), [("block/.*", VQ)], params=variables)
    for kernel in kernels(tree).values():
        (tensor,) = kernel.tensors
        assert not isinstance(tensor.codebook, FactoredCodebook) and tensor.index_bits == 3
    assert_runs_packed(model, tree, images(1))


@pytest.mark.slow
def test_a_kernel_that_vectors_and_groups_do_not_divide():
    rng = np.random.default_rng(0)
    params = {"odd": jnp.asarray(rng.normal(size=(7, 1, 5)), jnp.float32)}
    function = lambda params, x: jnp.einsum("bi,ijk->bjk", x, params["odd"])  # noqa: E731
    x = rng.normal(size=(30, 7)).astype(np.float32)
    rule = {"dim": 4, "bits": 1.0, "group_size": 16}
    tree = gptvq_jax.quantize(function, [x], [("odd", rule)], params=params)
    assert tree["odd"].layout.matrix == (5, 7)
    assert_runs_packed(function, tree, [x])


def test_a_rule_may_be_a_word(caplog):
    function = lambda params, x: x @ params["a"] + x @ params["b"] + x @ params["c"]  # noqa: E731
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32) for name in "abc"}
    x = rng.normal(size=(20, WIDTH)).astype(np.float32)
    rules = [("a", "int8"), ("b", "rtn"), ("c", "dense")]
    before = logging.get_verbosity()
    try:
        logging.set_verbosity(logging.INFO)
        tree = gptvq_jax.quantize(function, [x], rules, params=params)
    finally:
        logging.set_verbosity(before)
    (of_a,), (of_b,) = tree["a"].tensors, tree["b"].tensors
    assert (of_a.index_bits, of_b.index_bits) == (8, 3) and tree["c"] is params["c"]
    a = np.asarray(params["a"])
    error = np.abs(jax.jit(dequantize)(tree)["a"] - a).max(axis=0)
    assert (error <= np.abs(a).max(axis=0) / 255 * 1.01).all()
    check_int8_rows(jax.tree.map(np.asarray, of_a))
    said = [record.getMessage().split(",")[0] for record in caplog.records]
    expected = [f"{n}: {tree[n].bits_per_value:.3f} bits per value" for n in "ab"]
    assert said[-2:] == expected


def test_what_else_reads_a_packed_kernel_gets_it_dense(quantized):
    _, _, tree = quantized
    mixed = lambda tree: tree["params"]["mix"]["kernel"].sum()  # noqa: E731
    expected = jax.jit(lambda tree: mixed(dequantize(tree)))(tree)
    found = jax.jit(packed(mixed, "reference"))(tree)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class Tied(nn.Module):
    """An embedding that is the head as well."""

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(WIDTH, WIDTH, name="embedding")
        return embedding.attend(nn.Dense(WIDTH, name="inner")(embedding(tokens)))


def test_a_weight_of_a_product_that_stays_dense_is_said(caplog):
    model, tokens = Tied(), np.arange(8).reshape(2, 4)
    params = variables_of(model, tokens)
    tree = gptvq_jax.quantize(model, [tokens], [(".*", GPTQ)], params=params)
    assert set(kernels(tree)) == {"inner"}
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["embedding/embedding stays dense: gather reads it, not a product alone"]
    caplog.clear()
    rules = [("embedding/.*", "dense"), (".*", GPTQ)]
    gptvq_jax.quantize(model, [tokens], rules, params=params)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_generators_are_gone_through_once():
    model = nn.Dense(WIDTH)
    batches = [batch.reshape(-1, WIDTH) for batch in images()]
    variables = variables_of(model, batches[0])
    one = gptvq_jax.quantize(model, iter(batches), [("kernel", GPTQ)], params=variables)
    other = gptvq_jax.quantize(model, batches, [("kernel", GPTQ)], params=variables)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def refused(message, rules, batches=None, model=None, params=None, **options):
    own, variables = net()
    with pytest.raises(ValueError, match=message):
        gptvq_jax.quantize(
            own if model is None else model,
            images(1) if batches is None else batches,
            rules,
            params=variables if params is None else params,
            **options,
        )


class Unused(nn.Module):
    """Has a layer that only its other method calls."""

    def setup(self):
        self.used, self.other = nn.Dense(WIDTH), nn.Dense(WIDTH)

    def __call__(self, x):
        return self.used(x)

    def all(self, x):
        return self.other(self.used(x))


def test_a_layer_that_sees_no_input_is_named():
    x = images()[0].reshape(-1, WIDTH)
    model = Unused()
    params = variables_of(model, x, method="all")
    message = r"^other sees no input: .* put a rule for it, \('other', 'dense'\), first$"
    refused(message, [(".*", GPTQ)], [x], model, params)
    rules = [("other", "dense"), (".*", GPTQ)]
    assert set(kernels(gptvq_jax.quantize(model, [x], rules, params=params))) == {"used"}
    whole = lambda params, x: model.apply(params, x, method="all")  # noqa: E731
    refused("^used sees no input but zeros on", [("used", GPTQ)], [0 * x], whole, params)


@pytest.mark.parametrize(
    "rules, message",
    [
        (
            [("mlp", GPTQ)],
            r"^rules: rule 1 \('mlp'\) has no layer: .* such as 'patches', 'block/at.* and 4 more",
        ),
        ([("shared", GPTQ)], "a whole name, such as 'block/shared'; mend it, or leave it out$"),
        ([(".*", GPTQ), ("mix", VQ)], r"rule 2 \('mix'\) has no layer: rule 1 takes mix first"),
        ([("positions", VQ)], "positions is no layer, as add reads it"),
        ([("mix", {"bit": 3})], r"^rules: rule 1 \('mix'\): 'bit' is neither .*mean 'bits'\?$"),
        ([("mix", {"bits": "3"})], r"\('mix'\): bits='3' must be of type float"),
        ([("mix", {"dim": 2, "bits": 2.3})], r"\('mix'\): vq.bits=2.3 must be such that"),
        ([("mix", {"method": "int3"})], "method='int3' must be one of dense, int8, gptvq, .*rtn$"),
        ([("mix(", VQ)], r"^rules: the pattern 'mix\(' of rule 1 is no regular expression"),
        ([("mix", 3)], "sets 3; name a method, dense, int8, gptvq"),
        (["mix"], "rule 1 is 'mix' and must be a pair"),
        ([], r"rules is empty; name a layer at least, such as \('\.\*', 'int8'\)"),
        ({"mix": VQ}, "must be a tuple of rules, as in"),
        pytest.param(
            [("mix", {"method": "trellis", "bits": 1.0})],
            "mix: trellis.bits=1 is below what the scales and rates of a 8 x 8 layer take",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_rules_that_cannot_be_meant(rules, message):
    refused(message, rules)


@pytest.mark.parametrize(
    "batches, message",
    [
        ([np.zeros((6, 4, 5, 2), np.float32)], r"batch 0, float32\[6, 4, 5, 2\]: .*positions"),
        ([*images(1), np.zeros((6, 4, 4), np.float32)], r"take calibration batch 1, float32\[6, 4"),
        ([(images()[0], images()[0])], "take calibration batch 0, .* a tuple of its inputs"),
        ([["text"]], "batch 0 holds a str; a batch is an array or a tuple of arrays"),
        ([], "calibration has no batch"),
        (images()[0], r"must be a list of batches, such as \[x\], not one ndarray"),
    ],
)
def test_batches_that_the_model_does_not_take(batches, message):
    refused(message, [("mix", GPTQ)], batches)


def test_what_is_not_as_it_must_be():
    model, variables = net()
    rules = [("mix", GPTQ)]
    refused("inputs='both' must be one of float, quantized", rules, inputs="both")
    refused("damping=2 must be a number from 0 to 1", rules, damping=2)
    refused("damping='x' must be a number from 0 to 1", rules, damping="x")
    refused("seed=-1 must be from 0 to 4294967295", rules, seed=-1)
    refused("seed='a' must be an integer", rules, seed="a")
    refused("goes through the batches several times", rules, iter(images()), inputs="quantized")
    refused("params must be what apply takes first", rules, params=variables["params"])
    refused("model must be a Flax module, or a function of", rules, model=3)
    tree = gptvq_jax.quantize(model, images(), rules, params=variables)
    refused("the tree is quantized already", rules, params=tree)
    with pytest.raises(ValueError, match="params is missing"):
        gptvq_jax.quantize(Net(), images(), rules)
    with pytest.raises(ValueError, match="an NNX module has its own"):
        gptvq_jax.quantize(Mixer(nnx.Rngs(0)), images(), rules, params=variables)
    with pytest.raises(ValueError, match="implementation='fast' must be one of"):
        packed(model, "fast")
    with pytest.raises(ValueError, match="keep the packed tree"):
        dequantize(ready(tree, "reference"))


def test_bits_are_those_of_packed_kernels(quantized):
    model, variables, tree = quantized
    of = kernels(tree).values()
    expected = 8 * sum(k.num_bytes for k in of) / sum(k.num_values for k in of)
    assert bits_per_value(tree) == expected
    with pytest.raises(ValueError, match="no packed kernels"):
        bits_per_value(variables)
    assert all(isinstance(kernel, PackedKernel) for kernel in of)
