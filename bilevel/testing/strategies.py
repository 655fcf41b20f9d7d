"""Hypothesis strategies: bilevel problems with known answers, spectra, matrices and trees.

All draw NumPy arrays. `Case.to` converts a case to another backend. Hypothesis draws and shrinks the structure (sizes,
kinds of spectra, dtypes). The numbers come from a generator with a drawn seed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import linalg

from bilevel import problems
from bilevel.backend import Backend
from bilevel.problems.problem import Problem
from bilevel.spaces.tree import leaves_with_paths, tree_map

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ImportError(
        'bilevel.testing.strategies needs hypothesis, which is not installed: pip install "bilevel[testing]".'
    ) from error

Draw = Callable[[st.SearchStrategy[Any]], Any]
DTYPES = st.sampled_from([np.float64, np.float32])


class Case(NamedTuple):
    """A problem at a point, and its known answer.

    Attributes:
        problem, params, hparams, inner_args, outer_args: arguments of `bl.hypergradient`. ``params`` is the minimizer
            of the inner objective, rounded to the dtype; for an indefinite Hessian, its saddle point.
        grad: dF/dλ in closed form, computed in float64 from the drawn arrays.
        adjoint: v = H⁻¹ ∂F/∂w, of shape (n,), computed in the same way.
        hessian: H, of shape (n, n), in float64.
        condition: the ratio of the largest to the smallest absolute eigenvalue of H. Tolerances grow with it.
    """

    problem: Problem
    params: Any
    hparams: Any
    inner_args: tuple[Any, ...]
    outer_args: tuple[Any, ...]
    grad: np.ndarray
    adjoint: np.ndarray
    hessian: np.ndarray
    condition: float

    def to(self, backend: Backend) -> "Case":
        """Return the case with the problem's arrays in another framework. The answers stay in NumPy."""

        def convert(x: Any) -> Any:
            return backend.from_numpy(x) if isinstance(x, np.ndarray) else x

        def convert_fields(objective: Any) -> Any:
            arrays = {field.name: convert(getattr(objective, field.name)) for field in dataclasses.fields(objective)}
            return dataclasses.replace(objective, **arrays)

        return self._replace(
            problem=Problem(convert_fields(self.problem.inner), convert_fields(self.problem.outer)),
            params=convert(self.params),
            hparams=convert(self.hparams),
            inner_args=tuple(convert(x) for x in self.inner_args),
            outer_args=tuple(convert(x) for x in self.outer_args),
        )


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Draw a seeded NumPy generator."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def spectra(draw: Draw, n: int, max_condition: float = 1e4, indefinite: bool = False) -> np.ndarray:
    """Draw n eigenvalues: all equal, in two clusters, spread evenly, or spread over decades.

    They are positive, at least 1/max_condition and at most 1, times a scale from 1e-2 to 1e2. With ``indefinite``, at
    least one eigenvalue is negative.
    """
    condition = 10 ** draw(st.floats(0, np.log10(max_condition)))
    eigenvalues = {
        "multiple": np.ones(n),
        "clusters": np.where(np.arange(n) < n // 2, 1 / condition, 1.0),
        "even": np.linspace(1 / condition, 1.0, n),
        "decades": np.geomspace(1 / condition, 1.0, n),
    }[draw(st.sampled_from(["multiple", "clusters", "even", "decades"]))]
    eigenvalues = eigenvalues * 10 ** draw(st.floats(-2, 2))
    if indefinite:
        eigenvalues[: draw(st.integers(1, n))] *= -1
    return eigenvalues


@st.composite
def symmetric_matrices(
    draw: Draw, n: int, max_condition: float = 1e4, indefinite: bool = False, dtype: Any = np.float64
) -> np.ndarray:
    """Draw a symmetric matrix of shape (n, n) with eigenvalues from `spectra`, diagonal or in a random basis."""
    eigenvalues = draw(spectra(n, max_condition, indefinite))
    basis = np.eye(n)
    if draw(st.booleans()):
        basis = np.linalg.qr(draw(generators()).standard_normal((n, n)))[0]
    matrix = (basis * eigenvalues) @ basis.T
    return ((matrix + matrix.T) / 2).astype(dtype)


@st.composite
def trees(draw: Draw, dtype: Any = np.float64, max_leaves: int = 4, allow_empty: bool = True) -> Any:
    """Draw nested dicts, lists and tuples of arrays with standard normal entries, with at least one entry in total.

    Leaves have up to two axes of up to three entries. With ``allow_empty``, leaves may have no entries.
    """
    rng = draw(generators())
    shapes = st.lists(st.integers(0 if allow_empty else 1, 3), max_size=2)
    nested = st.recursive(
        shapes.map(np.zeros),
        lambda child: (
            st.lists(child, min_size=1, max_size=3)
            | st.lists(child, min_size=1, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from("abc"), child, min_size=1, max_size=3)
        ),
        max_leaves=max_leaves,
    )
    tree = draw(nested)
    if not any(leaf.size for _, leaf in leaves_with_paths(tree)):
        tree = [tree, np.zeros(1)]
    return tree_map(lambda leaf: np.asarray(rng.standard_normal(leaf.shape), dtype), tree)


@st.composite
def quadratic_problems(
    draw: Draw,
    max_params: int = 8,
    max_hparams: int = 4,
    max_condition: float = 1e4,
    indefinite: bool = False,
    dtypes: st.SearchStrategy[Any] = DTYPES,
) -> Case:
    """Draw a `bilevel.problems.quadratic` with params of shape (n,) and hparams of shape (m,).

    n and m are at least one. With ``indefinite``, the Hessian has negative eigenvalues and params is the saddle point.
    """
    n, m = draw(st.integers(1, max_params)), draw(st.integers(1, max_hparams))
    dtype, rng = draw(dtypes), draw(generators())
    hessian = draw(symmetric_matrices(n, max_condition, indefinite, dtype))
    coupling, target, offset, lam = (rng.standard_normal(shape).astype(dtype) for shape in ((n, m), (n,), (n,), (m,)))
    direct = draw(st.booleans()) * rng.standard_normal(m).astype(dtype)
    H, B, t, c, d, h = (x.astype(np.float64) for x in (hessian, coupling, target, offset, direct, lam))
    params = linalg.solve(H, B @ h + c).astype(dtype)
    adjoint = linalg.solve(H, params - t)
    return Case(
        problem=problems.quadratic(hessian, coupling, target, offset, direct),
        params=params,
        hparams=lam,
        inner_args=(),
        outer_args=(),
        grad=d + B.T @ adjoint,
        adjoint=adjoint,
        hessian=H,
        condition=float(np.linalg.cond(H)),
    )


@st.composite
def ridge_problems(
    draw: Draw, max_features: int = 6, max_examples: int = 12, dtypes: st.SearchStrategy[Any] = DTYPES
) -> Case:
    """Draw a `bilevel.problems.ridge` with params of shape (d,), and a penalty that is shared, per feature or group."""
    d, n = draw(st.integers(1, max_features)), draw(st.integers(1, max_examples))
    dtype, rng = draw(dtypes), draw(generators())
    penalty = draw(st.sampled_from(["shared", "feature", "group"]))
    groups = {"shared": np.zeros(d, int), "feature": np.arange(d), "group": rng.integers(0, 2, d)}[penalty]
    shape = {"shared": (), "feature": (d,), "group": (2,)}[penalty]
    lam = np.asarray(rng.uniform(-4, 1, shape), dtype)
    (X, X_val), (y, y_val) = (rng.standard_normal((2, *s)).astype(dtype) for s in ((n, d), (n,)))

    A, A_val, b, b_val = (x.astype(np.float64) for x in (X, X_val, y, y_val))
    penalties = np.exp(lam.reshape(-1).astype(np.float64))[groups]
    H = A.T @ A / n + np.diag(penalties)
    params = linalg.solve(H, A.T @ b / n, assume_a="pos").astype(dtype)
    adjoint = linalg.solve(H, A_val.T @ (A_val @ params - b_val) / n, assume_a="pos")
    per_feature = -penalties * params * adjoint
    return Case(
        problem=problems.ridge(groups if penalty == "group" else None),
        params=params,
        hparams=lam,
        inner_args=(X, y),
        outer_args=(X_val, y_val),
        grad=np.bincount(groups, per_feature, max(lam.size, 1)).reshape(shape),
        adjoint=adjoint,
        hessian=H,
        condition=float(np.linalg.cond(H)),
    )
