"""GPTVQ in plain float64 NumPy, one vector at a time, written from the paper's equations.

Nothing here is padded, blocked, transposed or batched, so none of that can be wrong twice.
"""

import copy
from typing import Any, NamedTuple

import jax
import numpy as np


class Problem(NamedTuple):
    """One layer, float32 as the package sees it; hinv_chol is U of `damped`."""

    weight: np.ndarray
    hessian: np.ndarray
    damped: np.ndarray
    hinv_chol: np.ndarray


def problem(rows: int, cols: int, seed: int = 0, tokens: int = 400) -> Problem:
    """Gaussian weights and strongly correlated inputs of uneven size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(cols, cols)) * np.exp(-np.arange(cols) / cols * 2)[:, None]
    inputs = rng.normal(size=(tokens, cols)) @ mix * rng.uniform(0.3, 2, cols)
    hessian = (inputs.T @ inputs / tokens).astype(np.float32)
    damped = hessian + np.float32(0.01 * np.mean(np.diag(hessian))) * np.eye(cols, dtype=np.float32)
    weight = rng.normal(size=(rows, cols)).astype(np.float32)
    return Problem(weight, hessian, damped, inverse_cholesky(damped).astype(np.float32))


def inverse_cholesky(hessian: np.ndarray) -> np.ndarray:
    """U, upper triangular, U^T U = H^-1."""
    return np.linalg.cholesky(np.linalg.inv(np.asarray(hessian, np.float64))).T


def loss(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    error = np.asarray(weight, np.float64) - np.asarray(quantized, np.float64)
    return float(np.trace(error @ np.asarray(hessian, np.float64) @ error.T))


def nearest(x: np.ndarray, centroids: np.ndarray, whiten: np.ndarray) -> int:
    """argmin_k |(x - c_k) T|^2, lowest index first."""
    return int(np.argmin([np.sum(((x - c) @ whiten) ** 2) for c in centroids]))


def em(points, whiten, weight, centroids, iterations):
    """Hessian-weighted EM of one group.

    Args: points (N, D), whiten (N, D, D), weight (N,), centroids (K, D).
    """
    centroids = np.array(centroids, np.float64)
    for _ in range(iterations):
        codes = [nearest(x, centroids, t) for x, t in zip(points, whiten, strict=True)]
        for k in range(len(centroids)):
            own = [n for n, code in enumerate(codes) if code == k and weight[n] > 0]
            if own:
                metrics = [weight[n] * whiten[n] @ whiten[n].T for n in own]
                right = sum(a @ points[n] for a, n in zip(metrics, own, strict=True))
                centroids[k] = np.linalg.lstsq(sum(metrics), right, rcond=None)[0]
    return centroids


def em_loss(points, whiten, weight, centroids) -> float:
    """sum_n weight_n min_k |(x_n - c_k) T_n|^2."""
    return sum(
        w * min(np.sum(((x - c) @ t) ** 2) for c in centroids)
        for x, t, w in zip(points, whiten, weight, strict=True)
    )


def mahalanobis(points: np.ndarray, size: int) -> np.ndarray:
    """Points at evenly spaced ranks (k + 1/2) / K of the Mahalanobis distance to the mean."""
    centered = points - points.mean(0)
    precision = np.linalg.inv(centered.T @ centered / len(points))
    order = np.argsort([x @ precision @ x for x in centered], kind="stable")
    return points[order[[int((k + 0.5) / size * len(points)) for k in range(size)]]]


class Swept(NamedTuple):
    codes: np.ndarray  # (R, J)
    quantized: np.ndarray  # (R, C)
    loss: float  # sum |E|^2
    codebooks: dict  # (column strip, row strip) -> (K, D)


def sweep(weight, hinv_chol, grid, fit, *, exact_metric=True, scale=None) -> Swept:
    """Algorithm 1 with block error feedback.

    Args:
      fit: (group of current weights (r, c'), scales (r, c'), U of its columns, strip, row strip)
        -> codebook (K, D).
      scale: (current weights of a column strip (R, c')) -> scales (R, c'), or None.
    """
    w = np.array(weight, np.float64)
    u = np.asarray(hinv_chol, np.float64)
    rows, cols = w.shape
    codes = np.zeros((rows, -(-cols // grid.dim)), int)
    scales = np.ones_like(w)
    books, total = {}, 0.0
    for start in range(0, cols, grid.dim):
        stop = min(start + grid.dim, cols)
        p, strip = slice(start, stop), start // grid.strip_cols
        if start % grid.strip_cols == 0:
            s = slice(start, min(start + grid.strip_cols, cols))
            if scale is not None:
                scales[:, s] = scale(w[:, s])
            for g, first in enumerate(range(0, rows, grid.strip_rows)):
                r = slice(first, min(first + grid.strip_rows, rows))
                books[strip, g] = fit(w[r, s], scales[r, s], u[s, s], strip, g)
        inverse = np.linalg.inv(u[p, p])
        metric = inverse if exact_metric else np.diag(1 / np.diag(u[p, p]))
        for r in range(rows):
            book = np.asarray(books[strip, r // grid.strip_rows], np.float64)[:, : stop - start]
            k = nearest(w[r, p] / scales[r, start], book, metric)
            codes[r, start // grid.dim] = k
            q = book[k] * scales[r, start]
            error = (w[r, p] - q) @ inverse
            total += np.sum(error**2)
            w[r, stop:] -= error @ u[p, stop:]
            w[r, p] = q
    return Swept(codes, w, total, books)


def block_scales(weight: np.ndarray, block_size: int) -> np.ndarray:
    """4-bit log2 scales of one column strip (R, c'), as the paper's section 3.3 stores them."""
    blocks = range(0, weight.shape[1], block_size)
    log = np.log2(np.stack([np.abs(weight[:, b : b + block_size]).max(1) for b in blocks], 1))
    offset = float(np.float16(log.min()))
    step = float(np.float16((log.max() - log.min()) / 15))
    code = np.clip(np.round((log - offset) / step), 0, 15)
    return np.repeat(2.0 ** (offset + step * code), block_size, 1)[:, : weight.shape[1]]


def with_numbers(settings: Any, numbers: dict) -> Any:
    """Frozen settings with traced numbers in them, so that one program serves for many values."""
    changed = copy.copy(settings)
    for name, value in numbers.items():
        object.__setattr__(changed, name, value)
    return changed


def count_equations(function, *args, **static) -> int:
    """Equations of the traced program, those inside loops and branches included, each once."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            total += 1
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            ):
                if hasattr(inner, "eqns"):
                    total += count(inner)
        return total

    return count(jax.make_jaxpr(lambda *a: function(*a, **static))(*args).jaxpr)
