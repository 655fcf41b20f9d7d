"""The ends of a symmetric operator's spectrum from a few products."""

from typing import Any, NamedTuple

from bilevel.operators.combinators import indices, norm
from bilevel.protocols import Operator, Tree, VectorSpace

PRODUCTS = 12
SEED = 0


class Spectrum(NamedTuple):
    """Estimated extreme eigenvalues; each is within its error of one that the operator has."""

    smallest: Any
    largest: Any
    smallest_error: Any
    largest_error: Any


class _State(NamedTuple):
    q_old: Tree
    q: Tree
    beta: Any
    alphas: Any
    betas: Any
    k: Any
    live: Any


def spectrum(operator: Operator, like: Tree, space: VectorSpace, products: int = PRODUCTS) -> Spectrum:
    """Estimate the extreme eigenvalues by Lanczos' method from a random start, with at most so many products.

    The error bound is that of the Ritz pairs, |β_k s_k| (Parlett, The Symmetric Eigenvalue Problem, 1998,
    §13.2). Power iteration with as many products is 0.5-4 % low, on the unsafe side for a step size.
    """
    xp, eps = space.xp, space.eps(like)
    products = min(products, space.size(like))

    def step(s: _State) -> _State:
        z = operator(s.q)
        alpha = space.dot(s.q, z)
        z = space.axpy(-alpha, s.q, space.axpy(-s.beta, s.q_old, z))
        z = space.axpy(-space.dot(s.q, z), s.q, z)  # again, for what rounding left of q
        beta = norm(z, space)
        here = s.live & (index == s.k)
        alphas, betas = xp.where(here, alpha, s.alphas), xp.where(here, beta, s.betas)
        # An invariant subspace is exhausted once beta is rounding noise.
        scale = xp.max(xp.abs(alphas)) + xp.max(xp.where(index < s.k, betas, 0.0))
        live = s.live & (beta > 10 * eps * scale)
        return _State(
            q_old=space.select(live, s.q, s.q_old),
            q=space.select(live, space.scale(xp.where(live, 1.0 / beta, 0.0), z), s.q),
            beta=xp.where(live, beta, s.beta),
            alphas=alphas,
            betas=betas,
            k=s.k + s.live,
            live=live & (s.k + 1 < products),
        )

    q = space.normal_like(like, SEED)
    q = space.scale(1.0 / norm(q, space), q)
    one = space.dot(q, q)
    zeros = xp.stack([xp.zeros_like(one)] * products)
    index = indices(one, products, xp)
    s = _State(
        q_old=space.zeros_like(q),
        q=q,
        beta=xp.zeros_like(one),
        alphas=zeros,
        betas=zeros,
        k=xp.zeros_like(one, dtype=xp.int32),
        live=one > 0,
    )
    s = space.while_loop(lambda s: s.live, step, s, products)

    # Rows that an early end left empty repeat the first: inside the spectrum, uncoupled.
    alphas = xp.where(index < s.k, s.alphas, s.alphas[0])
    coupling = xp.where(index < s.k - 1, s.betas, 0.0)
    column, row = index[None, :], index[:, None]
    off_diagonal = xp.where(column == row + 1, coupling[:, None], 0.0)
    tridiagonal = xp.where(column == row, alphas[:, None], 0.0) + off_diagonal + off_diagonal.T
    # LAPACK refuses nan where JAX and NumPy let it through.
    finite = xp.isfinite(xp.sum(tridiagonal))
    ritz, vectors = xp.linalg.eigh(xp.where(finite, tridiagonal, 0.0))
    last = xp.sum(xp.where(index == s.k - 1, s.betas, 0.0))
    tail = xp.sum(xp.where((index == s.k - 1)[:, None], vectors, 0.0), 0)
    nan = xp.where(finite, 0.0, float("nan"))
    errors = xp.abs(last * tail) + nan
    return Spectrum(ritz[0] + nan, ritz[-1] + nan, errors[0], errors[-1])
