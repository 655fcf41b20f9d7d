"""The ends of a spectrum by Lanczos' method, against the eigenvalues that the matrix is made of."""

import numpy as np
import pytest
from frameworks import framework, symmetric
from hypothesis import given
from hypothesis import strategies as st
from mutants import mutant

from bilevel.operators import lanczos
from bilevel.operators.linear_operator import LinearOperator

seeds = st.integers(0, 2**32 - 1)


def ends_of(backend, matrix, like):
    return lanczos.spectrum(LinearOperator(backend.space(like), lambda v: matrix @ v))


@given(
    eigenvalues=st.sampled_from([1, 3, 40]).flatmap(
        lambda n: st.lists(st.floats(-10, 10).map(lambda e: round(e, 3)), min_size=n, max_size=n)
    ),
    seed=seeds,
)
def test_lanczos_brackets_the_spectrum(backend, eigenvalues, seed):
    arrays = backend.from_numpy(symmetric(eigenvalues, seed)), backend.from_numpy(np.zeros(len(eigenvalues)))
    smallest, largest, _, error = (backend.to_host(end) for end in backend.run(ends_of, *arrays))
    width = max(map(abs, eigenvalues)) + 1e-300
    assert min(eigenvalues) - 1e-9 * width <= smallest <= largest <= max(eigenvalues) + 1e-9 * width
    # An unlucky start can miss the very end, but a step size of 1/(largest + error) must stay below 2/λmax.
    assert largest + error >= max(eigenvalues) - 0.5 * width


def test_lanczos_finds_the_ends_of_a_decaying_spectrum(backend):
    eigenvalues = np.concatenate([np.geomspace(1e-4, 10, 60), [-2.0]])
    arrays = backend.from_numpy(symmetric(eigenvalues)), backend.from_numpy(np.zeros(61))
    smallest, largest, _, error = (backend.to_host(end) for end in backend.run(ends_of, *arrays))
    assert largest == pytest.approx(10, rel=1e-3)
    assert smallest == pytest.approx(-2, rel=1e-2)
    assert largest + error >= 10 * (1 - 1e-6)


# Twelve products find the ends of the first two roughly. Of the others they find one end at once, and rounding errors
# along its eigenvector are large against the other end.
CLOSE = [np.ones(39), np.linspace(1, 1.01, 39), np.repeat([1, 3], [20, 19]), np.resize([1, -1], 39), np.zeros(39)]
SPECTRA = [np.linspace(1, 4, 40), np.linspace(-3, 4, 40), *(np.append(c, top) for top in (1e4, 1e6) for c in CLOSE)]


def excess(backend, spectrum=lanczos.spectrum):
    """Return the largest distance to an eigenvalue beyond the error that is said, over eps norm(A), in float32."""
    worst = -np.inf
    for eigenvalues in SPECTRA:
        for seed in range(20):
            matrix = symmetric(eigenvalues, seed).astype(np.float32)
            A, like = (backend.from_numpy(a) for a in (matrix, np.zeros(40, np.float32)))
            ends = spectrum(LinearOperator(backend.space(like), lambda v, A=A: A @ v))
            exact = np.linalg.eigvalsh(matrix.astype(np.float64))
            for estimate, error in zip(ends[:2], ends[2:], strict=True):
                beyond = np.abs(exact - float(estimate)).min() - float(error)
                worst = max(worst, beyond / (np.finfo(np.float32).eps * np.abs(exact).max()))
    return worst


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_each_end_is_within_its_error_of_an_eigenvalue(name):
    assert excess(framework(name)) <= 5


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("z = space.axpy(-space.dot(s.q, z), s.q, z)", "z = z"),
        ("xp.abs(last * tail)", "0 * xp.abs(last * tail)"),
    ],
    ids=["does not orthogonalise again", "says that there is no error"],
)
def test_a_fault_of_lanczos_is_caught(line, fault):
    faulty = mutant(lanczos, line, fault)
    assert excess(framework("numpy"), faulty.spectrum) > 10
