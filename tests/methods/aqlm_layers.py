"""AQLM on layers of a few hundred weights, for tests: numbers as arguments, losses in float64."""

import functools

import array_reference as ref
import jax
import numpy as np

from gptvq_jax.core.vq_tensor import dequantize
from gptvq_jax.methods.aqlm import AQLMSettings, _quantize

ROWS, COLS, DIM = 16, 44, 8  # 5.5 vectors
BASE = dict(num_codebooks=2, code_bits=4, dim=DIM, seed="kmeans++", beam=1, block_size=16)
# What a program takes as an argument, so that few need compiling.
NUMBERS = dict(rounds=0, tolerance=0.0, em_iterations=5, update_iterations=8)
ADAM_STEPS = 20
P = ref.problem(ROWS, COLS)
PAPER = dict(code_bits=2, seed="mahalanobis")  # of seeds without randomness
ADAM = dict(PAPER, codebook_update="adam")
SMALL = ref.problem(8, 16)
TINY = dict(num_codebooks=1, code_bits=2, dim=4)


@functools.cache
def program(options):
    """quantize, with numbers among its settings as arguments."""
    settings = AQLMSettings(**dict(options))

    def run(weight, hessian, hinv_chol, key, numbers):
        traced = ref.with_numbers(settings, numbers)
        grid = settings.grid(*weight.shape)
        return _quantize.__wrapped__(weight, 0, hessian, hinv_chol, key, traced, grid)

    return jax.jit(run)


def tensor_of(problem=P, key=0, **kw):
    options = {**BASE, **kw}
    numbers = {name: options.pop(name, default) for name, default in NUMBERS.items()}
    if options.get("codebook_update") == "adam":
        del numbers["update_iterations"]
        options["update_iterations"] = ADAM_STEPS
        numbers["learning_rate"] = options.pop("learning_rate")
    run = program(tuple(sorted(options.items())))
    return run(problem.weight, problem.hessian, problem.hinv_chol, jax.random.key(key), numbers)


run_dequantize = jax.jit(dequantize)


def loss_of(problem=P, key=0, **kw):
    """In float64, of the tensor as it is stored."""
    return ref.loss(problem.weight, decoded(tensor_of(problem, key, **kw)), problem.hessian)


def error_of(problem=P, key=0, **kw):
    return loss_of(problem, key, **kw) / ref.loss(problem.weight, 0, problem.hessian)


def mean_error(layers=4, **kw):
    """Of layers with keys of their own."""
    return np.mean([error_of(layer(seed), seed, **kw) for seed in range(layers)])


@functools.cache
def layer(seed):
    return ref.problem(ROWS, COLS, seed)


def parts(tensor):
    """Codes (M, R, J), centroids (M, K, D) and scales (R,), float64."""
    codes, centroids = np.asarray(tensor.unpack_codes()), tensor.codebook.centroids
    return (
        codes,
        np.asarray(centroids, np.float64)[:, 0, 0],
        np.asarray(tensor.row_scales, np.float64),
    )


def decode(codes, centroids, scales, cols=COLS):
    """(R, C), one codebook after the other."""
    vectors = sum(book[of_book] for book, of_book in zip(centroids, codes, strict=True))
    return (vectors.reshape(len(scales), -1) * scales[:, None])[:, :cols]


def decoded(tensor):
    return decode(*parts(tensor), cols=tensor.shape[1])


def same(one, other):
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
