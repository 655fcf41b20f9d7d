"""Extreme eigenvalues of a symmetric operator from a few products."""

from typing import Generic, NamedTuple, TypeVar

from bilevel.operators.indices import indices
from bilevel.operators.linear_operator import LinearOperator
from bilevel.spaces.array import Array, V

PRODUCTS = 12
SEED = 0
N = TypeVar("N")


class Spectrum(NamedTuple, Generic[N]):
    """Estimated extreme eigenvalues, as arrays or Python numbers. Each is within its error of an eigenvalue."""

    smallest: N
    largest: N
    smallest_error: N
    largest_error: N


class _State(NamedTuple, Generic[V]):
    q_old: V
    q: V
    beta: Array
    alphas: Array
    betas: Array
    k: Array
    live: Array


def spectrum(A: LinearOperator[V], products: int = PRODUCTS) -> Spectrum[Array]:
    """Estimate the extreme eigenvalues by Lanczos' method from a random start, with at most ``products`` products.

    The errors are the bounds of the Ritz pairs, |β_k s_k| (Parlett, The Symmetric Eigenvalue Problem, 1998, §13.2).
    Power iteration with as many products is 0.5-4 % too low, which makes a step size too large.
    """
    space = A.space
    xp, eps = space.xp, space.eps
    products = min(products, space.size)

    def step(s: _State[V]) -> _State[V]:
        z = A(s.q)
        alpha = space.dot(s.q, z)
        z = space.axpy(-alpha, s.q, space.axpy(-s.beta, s.q_old, z))
        z = space.axpy(-space.dot(s.q, z), s.q, z)  # a second time, because of rounding
        beta = space.norm(z)
        here = s.live & (index == s.k)
        alphas, betas = xp.where(here, alpha, s.alphas), xp.where(here, beta, s.betas)
        # Once beta is rounding noise, the subspace is invariant.
        scale = xp.max(xp.abs(alphas)) + xp.max(xp.where(index < s.k, betas, 0.0))
        live = s.live & (beta > 10 * eps * scale)
        return _State(
            q_old=space.where(live, s.q, s.q_old),
            q=space.where(live, space.scale(xp.where(live, 1.0 / beta, 0.0), z), s.q),
            beta=xp.where(live, beta, s.beta),
            alphas=alphas,
            betas=betas,
            k=xp.where(s.live, s.k + 1, s.k),
            live=live & (s.k + 1 < products),
        )

    q = space.normal(SEED)
    q = space.scale(1.0 / space.norm(q), q)
    one = space.dot(q, q)
    zeros = xp.stack([xp.zeros_like(one)] * products)
    index = indices(one, products, space)
    zero, start = xp.zeros_like(one), xp.zeros_like(one, dtype=xp.int32)
    s = _State(q_old=space.zeros(), q=q, beta=zero, alphas=zeros, betas=zeros, k=start, live=one > 0)
    s = space.while_loop(lambda s: s.live, step, s, products)

    # After an early end, the empty rows repeat the first one without coupling: they stay inside the spectrum.
    alphas = xp.where(index < s.k, s.alphas, s.alphas[0])
    coupling = xp.where(index < s.k - 1, s.betas, 0.0)
    column, row = index[None, :], index[:, None]
    off_diagonal = xp.where(column == row + 1, coupling[:, None], 0.0)
    tridiagonal = xp.where(column == row, alphas[:, None], 0.0) + off_diagonal + off_diagonal.T
    # Some LAPACK wrappers raise for nan.
    finite = xp.isfinite(xp.sum(tridiagonal))
    ritz, vectors = xp.linalg.eigh(xp.where(finite, tridiagonal, 0.0))
    last = xp.sum(xp.where(index == s.k - 1, s.betas, 0.0))
    tail = xp.sum(xp.where((index == s.k - 1)[:, None], vectors, 0.0), 0)
    nan = xp.where(finite, 0.0, float("nan"))
    errors = xp.abs(last * tail) + nan
    return Spectrum(ritz[0] + nan, ritz[-1] + nan, errors[0], errors[-1])
