"""FLOP of matrix products, from shapes: multiplications and additions, of what is executed.

What is not a product of matrices is not counted: lookups, searches, norms, softmax. Solves count as
LAPACK does them. Sizes are those of the arrays, padding included. R rows, C columns of a layer;
legend in grid.py. tests/core/test_flops.py counts the same in the traced programs.
"""

from collections.abc import Iterator


def product(m: int, k: int, n: int) -> int:
    """(m, k) @ (k, n)."""
    return 2 * m * k * n


def second_moment(tokens: int, cols: int, tile: int | None = None) -> int:
    """X^T diag(w) X of X (tokens, C).

    Args:
      tokens: rows of X.
      cols: C.
      tile: the sum is made in tiles of so many rows and columns, the last ones narrower, and of
        those below the diagonal none; None: the whole square.
    """
    if tile is None:
        return cross_moment(tokens, cols, cols)
    widths = list(_cut(cols, tile))
    pairs = sum(a * b for i, a in enumerate(widths) for b in widths[i:])
    return 2 * tokens * pairs


def _cut(size: int, part: int) -> Iterator[int]:
    return (min(part, size - start) for start in range(0, size, part))


def cross_moment(tokens: int, left: int, right: int) -> int:
    """X^T diag(w) Y of X (tokens, left) and Y (tokens, right)."""
    return product(left, tokens, right)


def cholesky(size: int) -> float:
    """L of a (size, size) matrix."""
    return size**3 / 3


def triangular_solve(size: int, count: int) -> int:
    """`count` right-hand sides; zeros in them are not made use of."""
    return size**2 * count


def inverse_cholesky(size: int) -> float:
    """U of H^-1 = U^T U: hessian.inverse_cholesky, once for each damping that is tried."""
    return cholesky(size) + triangular_solve(size, size)


def unit(rows: int, cols: int) -> int:
    """2 R C^2: a weight times a Hessian or a factor of it, what the maths of a layer consists of.

    A loss is 1, a residual too; the asymmetric target is 2, and the shift it takes 1.
    """
    return product(rows, cols, cols)


def lazy_pass(rows: int, cols: int, block: int, lanes: int = 1) -> int:
    """One pass over the columns that feeds what it changes into all others, a block at a time.

    That is a sweep, and a recode beside its first gradient, without their D x D transforms.

    Args:
      rows, cols: R and C.
      block: B columns per lazy update, inside which every vector updates the block.
      lanes: of the beam.
    """
    return lanes * (unit(rows, cols) + product(rows, block, cols))


def recode(rows: int, cols: int, block: int, passes: int = 1, beam: int = 1) -> int:
    """moves.recode without its D x D transforms, the residual given."""
    return passes * lazy_pass(rows, cols, block, beam)


def refit(rows: int, cols: int, iterations: int) -> int:
    """moves.refit without its inner products, the residual given."""
    return iterations * unit(rows, cols)
