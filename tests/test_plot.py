"""Pictures show the numbers of searches, solves and hyperparameters."""

import sys

import numpy as np
import pytest
from frameworks import FRAMEWORKS, framework

import bilevel as bl
from bilevel import plot
from bilevel.operators.lanczos import spectral_density
from bilevel.operators.linear_operator import LinearOperator

plt = pytest.importorskip("matplotlib.pyplot")

EIGENVALUES = np.array([-0.5, 1.0, 2.0, 3.0, 8.0])


@pytest.fixture(autouse=True)
def _no_screen():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def quadratic(eigenvalues=EIGENVALUES):
    size = len(eigenvalues)
    return bl.problems.quadratic(hessian=np.diag(eigenvalues), coupling=np.eye(size), target=np.ones(size))


def searched():
    problem = bl.problems.quadratic(hessian=2 * np.eye(2), coupling=np.eye(2), target=np.ones(2))
    return bl.minimize(problem, np.zeros(2), fit=lambda hparams, _: hparams / 2)


class TestHistory:
    @pytest.mark.parametrize("field", ["value", "grad_norm", "steps", "inner_grad_norm"])
    def test_each_field(self, field):
        found = searched()
        ax = plt.subplots()[1]
        assert plot.history(found, field=field, ax=ax) is ax
        assert np.array_equal(ax.lines[0].get_ydata(), [getattr(e, field) for e in found.history])
        assert np.array_equal(ax.lines[0].get_xdata(), 1 + np.arange(found.nfev))

    def test_failed_solves_have_crosses(self):
        history = searched().history
        history[1] = history[1]._replace(status=bl.Status.MAXITER)
        crosses = plot.history(history).lines[1]
        assert crosses.get_xdata().tolist() == [2]
        assert crosses.get_ydata().tolist() == [history[1].value]

    def test_the_scale(self):
        history = searched().history[:1]
        for values, scale in (([1.0, 20.0], "log"), ([1.0, 2.0], "linear"), ([-1.0, 20.0], "linear")):
            ax = plot.history([history[0]._replace(value=value) for value in values])
            assert ax.get_yscale() == scale

    def test_errors(self):
        with pytest.raises(ValueError, match=r'field: expected "value", .*got "?\'?valu\'?.* Did you mean "value"\?'):
            plot.history(searched(), field="valu")
        with pytest.raises(TypeError, match=r"expected a result of bl.minimize, or its history, got dict"):
            plot.history({})
        with pytest.raises(ValueError, match="there is no evaluation"):
            plot.history([])
        with pytest.raises(TypeError, match=r"ax: expected axes of matplotlib, .* got Figure"):
            plot.history(searched(), ax=plt.figure())
        nans = [e._replace(value=np.nan) for e in searched().history]
        with pytest.raises(ValueError, match="history: no evaluation has a finite 'value'"):
            plot.history(nans)

    def test_nan_is_a_gap(self):
        history = searched().history[:1]
        ax = plot.history([history[0]._replace(value=value) for value in (1.0, np.nan, 20.0)])
        assert np.array_equal(ax.lines[0].get_ydata(), [1.0, np.nan, 20.0], equal_nan=True)
        assert ax.get_yscale() == "log"


class TestHparams:
    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_the_largest_and_the_smallest(self, name):
        backend = framework(name)
        tree = {"a": backend.from_numpy(np.array([[3.0, -1.0], [0.5, 2.0]])), "b": backend.from_numpy(np.array(9.0))}
        ax = plot.hparams(tree, count=2)
        assert [bar.get_width() for bar in ax.patches] == [9.0, 3.0, 0.5, -1.0]
        assert [label.get_text() for label in ax.get_yticklabels()] == [
            "['b']",
            "['a'][0, 0]",
            "['a'][1, 0]",
            "['a'][0, 1]",
        ]
        assert ax.get_title() == "the 2 largest and the 2 smallest of 5"

    def test_few_entries_are_all_drawn_once(self):
        ax = plot.hparams(np.array([1.0, 3.0, 2.0]), names=["x", "y", "z"])
        assert [label.get_text() for label in ax.get_yticklabels()] == ["y", "z", "x"]
        assert ax.get_title() == ""

    def test_errors(self):
        with pytest.raises(ValueError, match="count: expected an integer >= 1, got 0"):
            plot.hparams(np.ones(3), count=0)
        with pytest.raises(ValueError, match="names: expected 3, one for each number, got 1"):
            plot.hparams(np.ones(3), names=["x"])
        for names in ("xyz", {"x": 1}, 3):
            with pytest.raises(TypeError, match=r"names: expected a list of 3 names, got (str|dict|int)"):
                plot.hparams(np.ones(3), names=names)
        with pytest.raises(ValueError, match=r"\['a'\]\[1\] is nan: no bar shows it"):
            plot.hparams({"a": np.array([1.0, np.nan, 2.0])})
        with pytest.raises(ValueError, match="hparams: there are no entries"):
            plot.hparams(np.zeros(0))

    def test_dollars_are_no_formulas(self):
        ax = plot.hparams(np.ones(2), names=["$5 and $6", r"$\nothing$"])
        ax.figure.canvas.draw()  # raises an error if it finds a formula
        assert [label.get_text() for label in ax.get_yticklabels()] == ["$5 and $6", r"$\nothing$"]
        assert not any(label.get_parse_math() for label in ax.get_yticklabels())


class TestSpectrum:
    def test_lines_are_at_the_eigenvalues(self):
        ax = plot.spectrum(quadratic(), np.zeros(5), np.zeros(5))
        positive, negative = ax.collections
        at = [float(line[0, 0]) for part in (negative, positive) for line in part.get_segments()]
        assert at == pytest.approx(EIGENVALUES)
        assert negative.get_label() == "negative"

    def test_heights_are_the_shares_of_the_start(self):
        backend = framework("numpy")
        start = backend.space(np.zeros(5)).normal(0)
        ax = plot.spectrum(quadratic(), np.zeros(5), np.zeros(5))
        heights = [line[1, 1] for part in reversed(ax.collections) for line in part.get_segments()]
        assert heights == pytest.approx(start**2 / (start @ start))

    @pytest.mark.parametrize("name", FRAMEWORKS)
    def test_few_products_give_the_moments(self, name):
        backend = framework(name)
        eigenvalues = np.linspace(-1, 5, 30)
        scales, space = backend.from_numpy(eigenvalues), backend.space(backend.from_numpy(np.zeros(30)))
        nodes, weights = map(backend.to_numpy, spectral_density(LinearOperator(space, lambda v: scales * v, True), 4))
        start = backend.to_numpy(space.normal(0))
        for power in range(8):  # Gauss quadrature with 4 nodes is exact up to degree 7
            assert weights @ nodes**power == pytest.approx(start**2 @ eigenvalues**power / (start @ start), rel=1e-4)

    def test_equations_have_no_symmetric_matrix(self):
        problem = bl.FixedPoint(lambda w, h: w / 2, lambda w, h: w.sum())
        with pytest.raises(ValueError, match="Jacobian of a fixed point or a root is not symmetric"):
            plot.spectrum(problem, np.zeros(2), np.zeros(2))

    @pytest.mark.parametrize("products", [0, -1, 2.5, True])
    def test_wrong_numbers_of_products(self, products):
        with pytest.raises(ValueError, match=f"products: expected an integer >= 1, got {products}"):
            plot.spectrum(quadratic(), np.zeros(5), np.zeros(5), products=products)

    def test_nan_is_named(self):
        with pytest.raises(ValueError, match=r"spectrum: a Hessian-vector product is not finite. bl.diagnose"):
            plot.spectrum(quadratic(np.array([np.nan, 1.0])), np.zeros(2), np.zeros(2))


class TestConvergence:
    def test_residuals_are_those_of_the_solves(self):
        problem, w = quadratic(EIGENVALUES[1:]), np.zeros(4)
        ax = plot.convergence(problem, w, w, {"CG": {"name": "cg", "damping": 0.1}}, counts=[1, 2])
        x, y = ax.lines[0].get_data()
        for count, residual in zip(x, y, strict=True):
            info = bl.hypergradient(
                problem, w, w, solver=bl.CG(maxiter=int(count), damping=0.1), on_failure="ignore"
            ).info
            assert residual == info.residual_norm / info.rhs_norm
        assert x.tolist() == [1, 2]

    def test_a_curve_ends_with_its_solve(self):
        w = np.zeros(4)
        ax = plot.convergence(quadratic(EIGENVALUES[1:]), w, w, {"a": "cg", "b": "neumann"})
        assert max(ax.lines[0].get_xdata()) == 4  # CG solves 4 equations in 4 steps
        assert max(ax.lines[1].get_xdata()) == 64

    def test_errors(self):
        w = np.zeros(5)
        with pytest.raises(ValueError, match=r"solvers\['x'\]: Identity has no option maxiter or terms"):
            plot.convergence(quadratic(), w, w, {"x": "identity"})
        with pytest.raises(TypeError, match=r"solvers: expected a mapping, .* got list"):
            plot.convergence(quadratic(), w, w, ["cg"])
        with pytest.raises(ValueError, match="solvers: there is none"):
            plot.convergence(quadratic(), w, w, {})
        for counts in ([], [0, 1], [2, 1], [1.5], 4):
            with pytest.raises(ValueError, match="counts: expected increasing integers >= 1"):
                plot.convergence(quadratic(), w, w, {"x": "cg"}, counts=counts)
        with pytest.raises(ValueError, match=r"solvers\['x'\]: after 1 .* the residual .* ∂F/∂w has the norm 0"):
            plot.convergence(quadratic(), np.ones(5), w, {"x": "cg"})  # F has its minimum there

    def test_labels_are_as_given(self):
        labels = ["_cg", r"$\nothing$"]
        ax = plot.convergence(quadratic(EIGENVALUES[1:]), np.zeros(4), np.zeros(4), dict.fromkeys(labels, "cg"))
        ax.figure.canvas.draw()
        assert [text.get_text() for text in ax.get_legend().get_texts()] == labels


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"Pictures need matplotlib, .* pip install matplotlib"):
        plot.hparams(np.ones(3))
