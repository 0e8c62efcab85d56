"""Every product of float32 numbers says that it is of float32: an accelerator rounds others first.

Programs are traced, not compiled or run, and their products collected from all loops and branches.
"""

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

from gptvq_jax import moves
from gptvq_jax.core import hessian, metrics
from gptvq_jax.core import products as core_products
from gptvq_jax.core.grid import GroupGrid
from gptvq_jax.core.row_weight import RowWeight
from gptvq_jax.core.vq_tensor import dequantize
from gptvq_jax.methods import gptvq
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.trainable import decode, parameters, unpack
from gptvq_jax.methods.uniform import UniformSettings
from gptvq_jax.models import llama
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.kv_cache import LayerCache
from gptvq_jax.moves.column_blocks import Coded
from gptvq_jax.moves.em import GroupData
from gptvq_jax.moves.outliers import Aside
from gptvq_jax.moves.residual import Residual
from gptvq_jax.moves.stream_column import Column, Layout
from gptvq_jax.run import expert_moments, finetune, gradients, model_loss, token_losses

pytestmark = pytest.mark.usefixtures("short_programs")

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def inexact_products(function, *args, **static):
    """Of the traced program: all its products, and those whose precision is nobody's choice.

    Of float32 numbers it must be 'highest'. Those of narrower ones are exact, and the dtype of
    their sums is asked for: it is not that of the operands, but in a model that is all bfloat16.
    """
    products, inexact = [], []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in PRODUCTS:
                products.append(eqn)
                wide = any(v.aval.dtype == jnp.float32 for v in eqn.invars)
                exact = eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2
                if not (exact if wide else eqn.params.get("preferred_element_type")):
                    inexact.append(str(eqn))
            is_jaxpr = lambda p: hasattr(p, "eqns")  # noqa: E731
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(inner):
                    walk(inner)

    walk(jax.make_jaxpr(lambda *args: function(*args, **static))(*args))
    return products, inexact


def test_products_are_found_wherever_they_stand():
    def in_loop(x):
        return lax.fori_loop(0, 3, lambda _, x: x @ x, x)

    def in_branch(x):
        return lax.cond(x[0, 0] > 0, lambda x: x, lambda x: jnp.vdot(x, x) * x, x)

    def in_solver(x):
        return lax.custom_linear_solve(lambda y: x @ y, x, lambda _, b: b)

    x = jnp.ones((2, 2))
    for function in (
        in_loop,
        in_branch,
        in_solver,
        jax.jit(in_loop),
        jax.grad(lambda x: (x @ x)[0, 0]),
    ):
        assert inexact_products(function, x)[1]
        with jax.default_matmul_precision("highest"):
            products, inexact = inexact_products(jax.jit(function), x)
            assert products and not inexact
    narrow = x.astype(jnp.bfloat16)
    assert inexact_products(lambda x: lax.dot(x, x), narrow)[1]
    summed = lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32)  # noqa: E731
    assert inexact_products(summed, narrow)[1] == []


# One group: G = S = 1, M codebooks of K centroids of D weights, J vectors, r rows.
M, K, D, J, R = 2, 4, 2, 4, 6
C = J * D
GRID = GroupGrid(R, C, D, R, C)
DATA = GroupData(jnp.ones((1, J, D, R)), jnp.ones((J, D, D)), jnp.ones((1, J, R)))
BOOKS = jnp.ones((M, 1, 1, K, D))
CODES = jnp.zeros((M, J, R), jnp.int32)
# C columns of one stream of 8 rows, windows of 4 bits.
STREAMS = jnp.ones((C, 1, 8))
COLUMNS = Column(
    jnp.zeros((C, 8), jnp.uint16), jnp.ones(C, jnp.float16), jnp.zeros((C, 8), jnp.float16)
)
# Arguments of the moves by name, and where the same name means something else, by move.
ARGS = dict(
    weight=jnp.ones((C, R)),
    quantized=jnp.ones((C, R)),
    unscaled=jnp.ones((C, R)),
    hessian=jnp.ones((C, C)),
    hinv_chol=jnp.ones((C, C)),
    whiten=DATA.whiten,
    centroids=BOOKS,
    codes=CODES,
    scales=jnp.ones((J, R)),
    scale=jnp.ones(R),
    values=BOOKS,
    data=DATA,
    residual=Residual(jnp.ones((C, R)), jnp.ones((C, R))),
    whole=Residual(jnp.ones((C, R)), jnp.ones((C, R))),
    error=jnp.ones((C, R)),
    key=jax.random.key(0),
    keys=jax.random.split(jax.random.key(0), 1),
    grid=GRID,
    dim=D,
    size=K,
    symmetric=True,
    bits=8,
    rank=2,
    iterations=2,
    rounds=2,
    tolerance=0.0,
    count=2,
    width=2,
    beam=2,
    codebook_size=K,
    block_size=4,
    rates=jnp.full(C, 2),
    layout=Layout(jnp.ones(8), jnp.ones(8), jnp.ones(16)),
    table=jnp.ones(16),
    stream_rows=8,
    native="jax",
)
OF_MOVE = {
    "search": dict(
        target=jnp.ones((2, 1, D, R)),
        books=BOOKS[:, 0],
        codes=CODES[:, :1],
        loss=jnp.ones((2, 1, R)),
    ),
    "follow": dict(values=jnp.ones((2, 1, R)), parent=jnp.zeros((2, 1, R), jnp.int32)),
    "assign": dict(centroids=BOOKS[0, 0]),
    "update": dict(centroids=BOOKS[0, 0], codes=CODES[:1]),
    "em": dict(centroids=BOOKS[0, 0]),
    "whitened": dict(centroids=BOOKS[0, 0]),
    "nearest": dict(points=jnp.ones((D, R)), centroids=BOOKS[0, 0, 0]),
    "nearest_few": dict(points=jnp.ones((D, R)), centroids=BOOKS[0, 0, 0]),
    "lookup": dict(centroids=BOOKS[0, 0, 0], codes=CODES[0, 0]),
    "sort_codebook": dict(centroids=BOOKS[..., :1]),
    "svd_factors": dict(centroids=BOOKS[..., :1]),
    "quantize_factors": dict(left=jnp.ones((M, 1, 1, 2)), right=jnp.ones((2, K))),
    "factored": dict(centroids=BOOKS[..., :1]),
    "gradient_update": dict(
        params=BOOKS,
        reconstruct=lambda books: moves.refit.decode(books, CODES, None, GRID),
        optimizer=optax.adam(0.1),
    ),
    "repeat": dict(state=jnp.ones(3), one_round=lambda x: x / 2, loss_of=jnp.sum),
    "cdf": dict(data=DATA._replace(points=DATA.points[:, :, :1])),
    "sweep": dict(fit=lambda data, keys: moves.seed.kmeans_plus_plus(data, K, keys)),
    "normalize_strip": dict(weight=jnp.ones((C, 1, R))),
    "set_aside": dict(limit=4.0),
    "without": dict(weight=jnp.ones((C, R)), outliers=jnp.ones((C, R)) > 2),
    "deviations": dict(aside=Aside(jnp.ones(C, jnp.float16), jnp.ones((C, R)) > 2)),
    "loss_if_coded": dict(
        aside=Aside(jnp.ones(C, jnp.float16), jnp.ones((C, R)) > 2), metric=jnp.ones(R),
        rates=jnp.full(R, 2), window_bits=4,
    ),
    "column_values": dict(column=jax.tree.map(lambda x: x[0], COLUMNS), rate=jnp.int32(2)),
    "with_outliers": dict(
        column=jax.tree.map(lambda x: x[0], COLUMNS), rate=jnp.int32(2), target=STREAMS[0, 0],
        outliers=STREAMS[0, 0] > 2,
    ),
    "first_scale": dict(target=STREAMS[0], weight=STREAMS[0], rate=jnp.int32(2)),
    "best_scale": dict(windows=COLUMNS.windows[0], target=STREAMS[0, 0], weight=STREAMS[0, 0]),
    "overlaps": dict(windows=COLUMNS.windows[0], rate=jnp.int32(2)),
    "search_column": dict(
        target=STREAMS[0, 0], weight=STREAMS[0, 0], scale=jnp.float32(1), rate=jnp.int32(2)
    ),
    "coded_values": dict(column=jax.tree.map(lambda x: x[0], COLUMNS), rate=jnp.int32(2)),
    "refit_levels": dict(
        residual=Residual(STREAMS[:, 0], STREAMS[:, 0]), columns=COLUMNS,
        levels=jnp.ones(4, jnp.float16),
    ),
    "least_squares": dict(
        params=BOOKS,
        forward=lambda books: moves.refit.decode(books, CODES, None, GRID),
        squared=lambda books: moves.refit.decode(books, CODES, None, GRID),
    ),
    "walk": dict(
        values=jnp.ones((C, R)), matrix=jnp.ones((C, C)), block=2, whole=False,
        code=lambda start, local, square, carry: Coded(local, local[0], carry=carry),
    ),
    "viterbi": dict(target=STREAMS[0], weight=STREAMS[0], rate=2),
    "tail_biting": dict(target=STREAMS[0], weight=STREAMS[0], rate=2),
    "search_streams": dict(target=STREAMS[0], weight=STREAMS[0], rate=jnp.int32(2)),
    "sweep_streams": dict(weight=STREAMS[:, 0], outliers=STREAMS[:, 0] > 2),
    "recode_streams": dict(
        residual=Residual(STREAMS[:, 0], STREAMS[:, 0]), columns=COLUMNS,
        outliers=STREAMS[:, 0] > 2,
    ),
}  # fmt: skip
ON_THE_HOST = ("distortion", "price", "spread", "water_fill")


def public_moves():
    """Every function that a module of `moves` defines for others."""
    for info in pkgutil.iter_modules(moves.__path__, f"{moves.__name__}."):
        module = importlib.import_module(info.name)
        for name, function in vars(module).items():
            own = getattr(function, "__module__", None) == module.__name__
            if own and inspect.isfunction(function) and not name.startswith("_"):
                yield function


# A geometry is no array.
MOVES = [
    move
    for move in public_moves()
    if move.__annotations__.get("return") is not GroupGrid and move.__name__ not in ON_THE_HOST
]


def call_of(move):
    """Positional arrays to trace, and the rest bound, so that arrays are not constants."""
    given = OF_MOVE.get(move.__name__, {})
    bound = {}
    for name, parameter in inspect.signature(move).parameters.items():
        if name in given or name in ARGS:
            bound[name] = given.get(name, ARGS.get(name))
        elif parameter.default is inspect.Parameter.empty:
            pytest.fail(f"{move.__name__} takes {name}, of which ARGS here has no example")
    traced = {
        n: v for n, v in bound.items() if any(hasattr(x, "dtype") for x in jax.tree.leaves(v))
    }
    static = {n: v for n, v in bound.items() if n not in traced}
    return (lambda arrays: move(**arrays, **static)), traced


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_products_of_a_move_are_of_float32(move):
    if move.__name__ == "uniform_fit":  # makes the move
        function, arrays = (lambda data: move(K, False)(data, None)), DATA
    else:
        function, arrays = call_of(move)
    products, inexact = inexact_products(function, arrays)
    assert inexact == []
    if move.__name__ in MULTIPLY:
        assert products


MULTIPLY = (
    "walk",
    "sweep",
    "sweep_streams",
    "recode_streams",
    "em",
    "update",
    "recode",
    "refit",
    "refit_levels",
    "least_squares",
    "gradient_update",
    "codebook_loss",
    "residual_of",
    "image_of",
)


def test_products_of_a_residual_are_of_float32():
    square, residual = jnp.ones((C, C)), ARGS["residual"]
    for function, *args in [
        (lambda residual: residual.loss, residual),
        (Residual.moved, residual, residual.error, square),
    ]:
        products, inexact = inexact_products(function, *args)
        assert products and inexact == []


METHOD_SETTINGS = [
    ("gptvq", GPTVQSettings(group_size=16, scale_block_size=8, em_iterations=1)),
    ("gptvq", GPTVQSettings(group_size=16, seed="mahalanobis", codebook_update="adam")),
    ("gptvq", GPTVQSettings(dim=1, group_size=16, svd_rank=2, exact_metric=False)),
    ("aqlm", AQLMSettings(code_bits=2, dim=4)),
    ("aqlm", AQLMSettings(code_bits=2, dim=4, start="residual", codebook_update="adam")),
    ("gptq", UniformSettings(group_size=4)),
    ("rtn", UniformSettings(group_size=4)),
]


@pytest.mark.parametrize("method, settings", METHOD_SETTINGS)
def test_products_of_a_method_are_of_float32(method, settings):
    weight, square = jnp.ones((R, C)), jnp.ones((C, C))
    quantize = METHODS[method].quantize
    products, inexact = inexact_products(
        quantize, weight, square, square, jax.random.key(0), settings=settings
    )
    assert products and inexact == []


def test_products_around_a_method_are_of_float32():
    weight, square, tokens = jnp.ones((R, C)), jnp.ones((C, C)), jnp.ones((3, C))
    tensor = jax.eval_shape(
        lambda w, h: gptvq.quantize(
            w, h, h, jax.random.key(0), GPTVQSettings(dim=1, bits=2.0, svd_rank=2, group_size=16)
        ),
        weight,
        square,
    )

    def rows_product(x):
        return x @ RowWeight(jnp.ones((5, C)))

    def gradient(tensor):
        return jax.grad(lambda params: jnp.sum(decode(unpack(tensor), params)))(parameters(tensor))

    for products, inexact in [
        inexact_products(hessian.add_inputs, hessian.init_moment(C), tokens),
        inexact_products(hessian.asymmetric_target, weight, square, weight, square, 1.0),
        inexact_products(hessian.add_products, hessian.init_moment(C), tokens, tokens),
        *(
            inexact_products(core_products.matmul, tokens, square, products=how)
            for how in core_products.PRODUCTS
        ),
        inexact_products(rows_product, tokens),
        inexact_products(metrics.relative_error, weight, weight, square),
        inexact_products(dequantize, tensor),
        inexact_products(gradient, tensor),
    ]:
        assert products and inexact == []
    assert inexact_products(hessian.inverse_cholesky, square)[1] == []


def test_products_of_moments_of_experts_are_of_float32():
    slots = expert_moments.sort_slots(jnp.array([1, 0, 1]), 2)
    moments = hessian.init_moment(C), hessian.init_moment(C)
    x = jnp.ones((3, C))

    def add(moment, cross, x):
        return expert_moments.add_slots(slots, 1, moment, x, jnp.ones((3, 1)), cross, x)

    products, inexact = inexact_products(add, *moments, x)
    assert products and inexact == []


CONFIG = ModelConfig.from_hf(
    dict(
        model_type="llama",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=12,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
)


def model_programs(dtype):
    """What runs the model: calibration, tuning, gradients, evaluation, generation."""
    config, tokens = CONFIG, jnp.zeros((2, 5), jnp.int32)
    params = jax.eval_shape(llama.Decoder(config).init, jax.random.key(0), tokens)["params"]
    block = params["layers_0"]
    outer = {name: leaf for name, leaf in params.items() if name != "layers_0"}
    x = jnp.ones((2, 5, 16), dtype)
    untied = {**outer, "embed_tokens": {"embedding": RowWeight(jnp.ones((12, 16), dtype))}}

    def caches():
        return LayerCache.zeros(config, 2, 8, dtype)

    yield "block", lambda b, x: llama.block_forward_with_inputs(config, b, x), (block, x)
    yield "prefill", lambda b, x: llama.block_step(config, b, x, caches()), (block, x)
    step = lambda b, x, p: llama.block_step(config, b, x[:, :1], caches(), p)  # noqa: E731
    yield "step", step, (block, x, tokens[:, :1])
    yield "head", lambda o, x: llama.head_logits(config, o, x), (outer, x)
    yield "row head", lambda o, x: llama.head_logits(config, o, x[:1, :1]), (untied, x)
    if dtype == jnp.float32:
        yield "loss", lambda o, x: token_losses.token_nll(config, o, x, tokens), (outer, x)
        both = lambda o, x: token_losses.token_figures(config, o, x, config, o, x, tokens)  # noqa: E731
        yield "two losses", both, (outer, x)
        kl = lambda o, x: model_loss.divergence(config, o, x, config, o, x)  # noqa: E731
        yield "divergence and its gradient", kl, (outer, x)
        backward = lambda b, x: gradients.block_backward(config, b, x, x, 1)  # noqa: E731
        yield "backward", backward, (block, x)
        head = lambda o, x: gradients.head_backward(config, o, x, tokens)  # noqa: E731
        yield "head backward", head, (outer, x)
        named = finetune.traverse_util.flatten_dict(block, sep="/")
        kernels = {n: jnp.ones(k.shape[::-1]) for n, k in named.items()}
        tune = lambda k, x: finetune._gradients(config, k, {}, x, x, 1.0)  # noqa: E731
        yield "tuning", tune, (kernels, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_the_model_are_of_float32_where_its_activations_are(dtype):
    for name, function, args in model_programs(dtype):
        products, inexact = inexact_products(function, *args)
        assert products and inexact == [], name
