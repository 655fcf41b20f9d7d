"""Extreme eigenvalues of a symmetric operator from a few products."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from bilevel.operators.indices import indices
from bilevel.operators.linear_operator import LinearOperator
from bilevel.spaces.array import Array, V

PRODUCTS = 12
LATE = 4  # the last products, whose change of an estimate tells how much is missing
NOISE = 100  # times eps and the norm of A: a curvature below it is zero to rounding
SEED = 0
N = TypeVar("N")


class Spectrum(NamedTuple, Generic[N]):
    """Estimated extreme eigenvalues, as arrays or Python numbers. Each is within its error of an eigenvalue."""

    smallest: N
    largest: N
    smallest_error: N
    largest_error: N


class _Process(NamedTuple, Generic[V]):
    q_old: V
    q: V
    beta: Array
    alphas: Array  # the diagonal of the tridiagonal matrix
    betas: Array  # betas[k] couples row k to the next one
    k: Array  # number of rows
    live: Array


def spectrum(
    A: LinearOperator[V], products: int = PRODUCTS, project: Callable[[V], V] | None = None
) -> Spectrum[Array]:
    """Estimate the extreme eigenvalues by Lanczos' method from a random start, with at most ``products`` products.

    ``project`` moves the start into an invariant subspace. Then the eigenvalues are of the operator in this subspace.

    The errors are the bounds of the Ritz pairs, |β_k s_k| (Parlett, The Symmetric Eigenvalue Problem, 1998, §13.2).
    Power iteration with as many products is 0.5-4 % too low, which makes a step size too large.
    """
    xp, s = A.space.xp, _lanczos(A, _start(A, project), products)
    index = _index(s, A)
    ritz, vectors, nan = _ritz(s, s.k, A)
    last = xp.sum(xp.where(index == s.k - 1, s.betas, 0.0))
    tail = xp.sum(xp.where((index == s.k - 1)[:, None], vectors, 0.0), 0)
    errors = xp.abs(last * tail) + nan
    return Spectrum(ritz[0] + nan, ritz[-1] + nan, errors[0], errors[-1])


def spectral_density(
    A: LinearOperator[V], products: int, project: Callable[[V], V] | None = None
) -> tuple[Array, Array]:
    """Return nodes and weights, of shape (products,), of the spectral density of A, seen from a random vector.

    It is Lanczos quadrature (Golub & Meurant, Matrices, Moments and Quadrature, 2010, ch. 6). The weights add up to
    one. Nodes that do not exist, because the subspace is invariant, have weight zero. ``project`` is as in `spectrum`.
    """
    s = _lanczos(A, _start(A, project), products)
    ritz, vectors, nan = _ritz(s, s.k, A)
    return ritz + nan, vectors[0] ** 2


def negative_curvature(A: LinearOperator[V], start: V) -> tuple[Array, Array]:
    """Estimate max(0, −λmin) of the operator, seen from a vector. Return it, and the number of products, at most 12.

    A Ritz value is no smaller than λmin. So its change by the last 4 products is added, at most doubling it. A value
    that is zero to rounding gives zero. Choose a ``start`` that is rich in directions of small curvature, such as the
    iterate of CG at its first direction of negative curvature.
    """
    xp, s = A.space.xp, _lanczos(A, start, PRODUCTS)
    ritz, _, nan = _ritz(s, s.k, A)
    before = _ritz(s, xp.maximum(s.k - LATE, xp.ones_like(s.k)), A)[0]
    seen, earlier = -ritz[0], -before[0]
    # In an invariant subspace, the value is exact.
    missing = xp.where(s.live & (s.k < A.space.size), xp.clip(seen - earlier, 0.0, None), 0.0)
    noise = NOISE * A.space.eps * xp.maximum(xp.abs(ritz[0]), xp.abs(ritz[-1]))
    return xp.where(seen > noise, seen + xp.minimum(seen, missing), 0.0) + nan, s.k


def _start(A: LinearOperator[V], project: Callable[[V], V] | None) -> V:
    start = A.space.normal(SEED)
    return start if project is None else project(start)


def _lanczos(A: LinearOperator[V], start: V, products: int) -> _Process[V]:
    """Run Lanczos' method. ``live`` is false at the end if the subspace is invariant."""
    space = A.space
    xp, eps = space.xp, space.eps
    products = min(products, space.size)

    def step(s: _Process[V]) -> _Process[V]:
        z = A(s.q)
        alpha = space.dot(s.q, z)
        z = space.axpy(-alpha, s.q, space.axpy(-s.beta, s.q_old, z))
        z = space.axpy(-space.dot(s.q, z), s.q, z)  # a second time, because of rounding
        beta = space.norm(z)
        here = xp.where(s.live, index == s.k, False)
        alphas, betas = xp.where(here, alpha, s.alphas), xp.where(here, beta, s.betas)
        # Once beta is rounding noise, the subspace is invariant.
        scale = xp.max(xp.abs(alphas)) + xp.max(xp.where(index < s.k, betas, 0.0))
        live = s.live & (beta > 10 * eps * scale)
        return _Process(
            q_old=space.where(live, s.q, s.q_old),
            q=space.where(live, space.scale(xp.where(live, 1.0 / beta, 0.0), z), s.q),
            beta=xp.where(live, beta, s.beta),
            alphas=alphas,
            betas=betas,
            k=xp.where(s.live, s.k + 1, s.k),
            live=live,
        )

    size = space.norm(start)
    q = space.scale(1.0 / xp.where(size > 0, size, 1.0), start)
    one = space.dot(q, q)
    zeros = xp.stack([xp.zeros_like(one)] * products)
    index = indices(one, products, space)
    zero, first = xp.zeros_like(one), xp.zeros_like(one, dtype=xp.int32)
    s = _Process(q_old=space.zeros(), q=q, beta=zero, alphas=zeros, betas=zeros, k=first, live=one > 0)
    return space.while_loop(lambda s: s.live & (s.k < products), step, s, products)


def _index(s: _Process[V], A: LinearOperator[V]) -> Array:
    return indices(s.beta, s.alphas.shape[0], A.space)


def _ritz(s: _Process[V], rows: Array, A: LinearOperator[V]) -> tuple[Array, Array, Array]:
    """Return eigenvalues and eigenvectors of the first rows of the tridiagonal matrix, and nan if it is not finite.

    The other rows repeat the first one without coupling: they stay inside the spectrum.
    """
    xp, index = A.space.xp, _index(s, A)
    alphas = xp.where(index < rows, s.alphas, s.alphas[0])
    coupling = xp.where(index < rows - 1, s.betas, 0.0)
    column, row = index[None, :], index[:, None]
    off_diagonal = xp.where(column == row + 1, coupling[:, None], 0.0)
    tridiagonal = xp.where(column == row, alphas[:, None], 0.0) + off_diagonal + off_diagonal.T
    # Some LAPACK wrappers raise for nan.
    finite = xp.isfinite(xp.sum(tridiagonal))
    ritz, vectors = xp.linalg.eigh(xp.where(finite, tridiagonal, 0.0))
    return ritz, vectors, xp.where(finite, 0.0, float("nan"))
