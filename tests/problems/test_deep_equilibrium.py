"""Deep equilibrium models as fixed points and roots: against solutions of SciPy."""

import numpy as np
import pytest
from cases import KINDS
from frameworks import framework, namespace, relative_error
from scipy import optimize

import bilevel as bl
from bilevel.testing import check_hypergradient, exact_hypergradient, finite_difference_hypergradient


class TestDeepEquilibrium:
    """z = tanh(Wz + Ux + b) for a few inputs x; λ = (W, U, b), and F reads z through a linear map."""

    @pytest.fixture(params=["torch", "jax"])
    def autodiff(self, request):
        return framework(request.param)

    @pytest.fixture
    def arrays(self):
        rng = np.random.default_rng(0)
        W = rng.standard_normal((3, 3))
        hparams = {"W": 0.7 * W / np.linalg.norm(W, 2), "U": rng.standard_normal((3, 2)), "b": rng.standard_normal(3)}
        x, y, readout = rng.standard_normal((2, 2)), rng.standard_normal(2), rng.standard_normal(3)
        return hparams, x, y, readout

    @staticmethod
    def problem(xp, kind):
        def step(params, h, x):
            return {"z": xp.tanh(h["W"] @ params["z"] + h["U"] @ x + h["b"][:, None])}

        def residual(params, h, x):
            return {"z": params["z"] - step(params, h, x)["z"]}

        def outer(params, h, y, readout):
            return ((readout @ params["z"] - y) ** 2).sum() + 0.1 * (h["U"] ** 2).sum()

        return bl.FixedPoint(step, outer) if kind == "fixed point" else bl.Root(residual, outer)

    @staticmethod
    def solve(hparams, x):
        def residual(z):
            z = z.reshape(3, 2)
            return (z - np.tanh(hparams["W"] @ z + hparams["U"] @ x + hparams["b"][:, None])).ravel()

        found = optimize.root(residual, np.zeros(6), tol=1e-14)
        assert np.abs(found.fun).max() < 1e-13
        return found.x.reshape(3, 2)

    def move(self, backend, arrays):
        hparams, x, y, readout = arrays
        params = {"z": backend.from_numpy(self.solve(hparams, x))}
        moved = {name: backend.from_numpy(h) for name, h in hparams.items()}
        data = {"inner_args": (backend.from_numpy(x),), "outer_args": tuple(map(backend.from_numpy, (y, readout)))}
        return params, moved, data

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_matches_differences_of_the_solution_by_scipy(self, autodiff, arrays, kind):
        hparams, x, y, readout = arrays
        params, moved, data = self.move(autodiff, arrays)
        hg = bl.hypergradient(self.problem(namespace(autodiff), kind), params, moved, solver="exact", **data)

        def outer(h):
            return ((readout @ self.solve(h, x) - y) ** 2).sum() + 0.1 * (h["U"] ** 2).sum()

        rng, step = np.random.default_rng(1), 1e-5
        for _ in range(3):
            d = {name: rng.standard_normal(h.shape) for name, h in hparams.items()}
            high, low = (outer({n: h + s * step * d[n] for n, h in hparams.items()}) for s in (1, -1))
            along = sum(np.sum(autodiff.to_numpy(hg.grad[n]) * d[n]) for n in d)
            assert along == pytest.approx((high - low) / (2 * step), rel=1e-7)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_references_hold_for_it(self, autodiff, arrays, kind):
        params, hparams, data = self.move(autodiff, arrays)
        problem = self.problem(namespace(autodiff), kind)
        check_hypergradient(problem, params, hparams, solver=bl.GMRES(rtol=1e-10), **data)
        exact = exact_hypergradient(problem, params, hparams, **data)
        away = {"z": params["z"] + 0.3}  # the differences find the solution themselves
        differences = finite_difference_hypergradient(problem, away, hparams, **data)
        assert relative_error(differences.params["z"], params["z"]) <= 1e-12
        for name in hparams:
            assert relative_error(differences.grad[name], exact.grad[name]) <= 1e-6

    def test_a_check_finds_a_truncated_solve(self, autodiff, arrays):
        params, hparams, data = self.move(autodiff, arrays)
        problem = self.problem(namespace(autodiff), "fixed point")
        with pytest.raises(AssertionError, match="Identity"):
            check_hypergradient(problem, params, hparams, solver="identity", **data)

    def test_a_fixed_point_off_its_solution_is_found_out_by_differences(self, autodiff, arrays):
        params, hparams, data = self.move(autodiff, arrays)
        problem = self.problem(namespace(autodiff), "fixed point")
        away = {"z": params["z"] + 0.3}
        with pytest.raises(AssertionError, match="params is not the minimizer"):
            check_hypergradient(problem, away, hparams, solver="exact", reference="finite-differences", **data)
