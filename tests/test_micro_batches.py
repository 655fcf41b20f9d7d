"""Objectives over micro-batches: as on all data at once, on every backend and by every solver."""

import re
import warnings
from itertools import pairwise

import numpy as np
import pytest
from cases import KINDS, equation, ridge
from frameworks import DTYPES, framework, namespace, relative_error, tolerance
from hypothesis import given
from hypothesis import strategies as st

import bilevel as bl
from bilevel.micro_batches import MicroBatches
from bilevel.testing import check_hypergradient

SOLVERS = ["cg", "minres", "gmres", "bicgstab", "neumann", "nystrom", "exact", "identity", "unrolled"]
SPLITS = {
    "whole arrays": lambda args: bl.MicroBatches(args, size=4),
    "a list": lambda args: bl.MicroBatches(cut(args, 2, 5)),
    "a loader": lambda args: bl.MicroBatches(Loader(cut(args, 2, 5))),
}


class Loader:
    """A loader that can be iterated again, without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def cut(args, *places):
    """Return a list of micro-batches, cut at these examples."""
    ends = [0, *places, len(args[0])]
    return [[a[i:j] for a in args] for i, j in pairwise(ends)]


def split(case, form):
    """Return a case with both data in micro-batches."""
    for name in case.args:
        case.args[name] = SPLITS[form](case.args[name])
    return case


@pytest.fixture(params=SPLITS)
def form(request, backend):
    if backend.name == "jax" and request.param == "a loader":
        pytest.skip("compiled code cannot read a loader: see test_bad_input_names_the_way_out")
    return request.param


@pytest.fixture(params=["torch", "jax"])
def autodiff(request):
    return framework(request.param)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_returns_the_hypergradient_of_all_data(backend, solver):
    expected = ridge(backend).hypergradient(solver)
    found = split(ridge(backend), "whole arrays").hypergradient(solver)
    assert relative_error(backend.to_numpy(found.grad), backend.to_numpy(expected.grad)) <= 1e-12
    assert relative_error(backend.to_numpy(found.adjoint), backend.to_numpy(expected.adjoint)) <= 1e-12
    assert found.info.status is expected.info.status


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_of_data_gives_the_closed_form(backend, form, dtype):
    """The penalty is in each micro-batch's loss, and counts once. The micro-batches have different sizes."""
    case = split(ridge(backend, dtype=dtype), form)
    hg = case.hypergradient("exact")
    assert relative_error(backend.to_numpy(hg.grad), case.grad) <= tolerance(dtype, condition=40)
    assert relative_error(backend.to_host(hg.value), case.value) <= tolerance(dtype)
    assert backend.to_numpy(hg.grad).dtype == backend.to_numpy(hg.value).dtype == dtype
    assert hg.info.inner_grad_norm <= tolerance(dtype) * np.linalg.norm(case.minimum) * 10


@given(samples=st.integers(1, 12), size=st.integers(1, 13), seed=st.integers(0, 2**32 - 1))
def test_any_size_of_micro_batches_gives_the_same(backend, samples, size, seed):
    case = ridge(backend, samples, seed=seed)
    case.args["inner_args"] = bl.MicroBatches(case.args["inner_args"], size=size)
    hg = case.hypergradient("exact")
    assert np.linalg.norm(backend.to_numpy(hg.grad) - case.grad) <= 1e-10 * (1 + np.linalg.norm(case.grad))


def test_weights_and_sums(backend):
    """Against the definition: Σ a L_b / Σ a and Σ a L_b, where L_b is the mean over micro-batch b, with its penalty."""
    plain = ridge(backend)
    X, y = plain.args["inner_args"]
    batches, factors = [(X[:3], y[:3]), (X[3:6], y[3:6]), (X[6:], y[6:])], [1.0, 2.0, 5.0]
    xp = namespace(backend)
    rows = xp.sqrt(backend.from_numpy(np.repeat(np.array(factors), 3) * 9 / 3 / 8))
    plain.args["inner_args"] = (X * rows[:, None], y * rows)
    expected = plain.hypergradient("exact")
    case = ridge(backend)
    case.args["inner_args"] = bl.MicroBatches(batches, weights=factors)
    mean = case.hypergradient("exact")
    assert relative_error(backend.to_numpy(mean.grad), backend.to_numpy(expected.grad)) <= 1e-12
    case.args["inner_args"] = bl.MicroBatches(batches, reduction="sum", weights=factors)
    total = case.hypergradient("exact")
    assert relative_error(8 * backend.to_numpy(total.adjoint), backend.to_numpy(expected.adjoint)) <= 1e-12
    assert relative_error(backend.to_numpy(total.grad), backend.to_numpy(expected.grad)) <= 1e-12
    case.args["inner_args"] = bl.MicroBatches((X, y), size=3, reduction="sum")
    total = case.hypergradient("exact")
    case.args["inner_args"] = bl.MicroBatches((X, y), size=3, reduction="sum", weights=[1.0, 1.0, 1.0])
    assert np.array_equal(backend.to_numpy(case.hypergradient("exact").grad), backend.to_numpy(total.grad))


@pytest.mark.parametrize("kind", KINDS)
def test_equations(backend, kind):
    """The mean of two affine maps is the map of the means."""
    case = equation(kind, backend)
    A, B, c = case.args["inner_args"]
    case.args["inner_args"] = bl.MicroBatches([(1.5 * A, B, 0.5 * c), (0.5 * A, B, 1.5 * c)], weights=[1, 1])
    assert relative_error(case.hypergradient("exact").grad, case.grad) <= 1e-12


def images(backend, samples=11):
    """Return params, hparams and data of a network with a weight per example and a decay per leaf."""
    rng = np.random.default_rng(0)
    w = {"A": rng.standard_normal((3, 4)), "B": rng.standard_normal((4, 3))}
    h = {"decay": {name: rng.standard_normal() - 1 + 0 * a[0, 0] for name, a in w.items()}}
    h["weights"] = rng.standard_normal(samples)
    data = rng.standard_normal((samples, 3)), np.eye(3)[rng.integers(0, 3, samples)], np.arange(samples)

    def move(tree):
        return {k: move(v) for k, v in tree.items()} if isinstance(tree, dict) else backend.from_numpy(np.asarray(tree))

    return move(w), move(h), tuple(map(move, data))


def network_problem(backend, curvature):
    """Return the network's problem: indices choose the examples' weights."""
    xp = namespace(backend)

    def model(w, h, batch):
        x, index = batch
        return xp.tanh(x @ w["A"]) @ w["B"], xp.exp(h["weights"])[index]

    def loss(output, y):
        z, weights = output
        return (weights * (xp.log(xp.exp(z).sum(-1)) - (z * y).sum(-1))).mean()

    def penalty(w, h):
        return sum((xp.exp(h["decay"][name]) * w[name] ** 2).sum() for name in w)

    def outer(w, h, batch, y):
        return ((xp.tanh(batch[0] @ w["A"]) @ w["B"] - y) ** 2).mean()

    return bl.Problem.from_model(model, loss, outer, penalty=penalty, curvature=curvature)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton", "finite-differences"])
def test_weights_of_examples_and_every_curvature(autodiff, curvature):
    w, h, (x, y, index) = images(autodiff)
    problem, solver = network_problem(autodiff, curvature), bl.MINRES(rtol=1e-13, damping=0.1)
    whole = ((x, index), y)
    at = {"solver": solver, "on_failure": "ignore"}
    expected = bl.hypergradient(problem, w, h, inner_args=whole, outer_args=whole, **at).grad
    parts = bl.MicroBatches(whole, size=3)
    found = bl.hypergradient(problem, w, h, inner_args=parts, outer_args=parts, **at).grad
    error = 1e-6 if curvature == "finite-differences" else 1e-10
    space = autodiff.space(h)
    assert float(space.norm(space.subtract(found, expected))) <= error * float(space.norm(expected))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_unrolling(backend, mode):
    solver = bl.Unrolled(steps=7, mode=mode, step_size=0.1, checkpoint=False if mode == "reverse" else "auto")
    expected = ridge(backend).hypergradient(solver).grad
    found = split(ridge(backend), "a list").hypergradient(solver).grad
    assert relative_error(backend.to_numpy(found), backend.to_numpy(expected)) <= 1e-12


def test_preparing(backend):
    case, whole = split(ridge(backend), "a list"), ridge(backend)
    found, expected = (bl.prepare("neumann", *c.at, inner_args=c.args["inner_args"]).state for c in (case, whole))
    assert relative_error(backend.to_numpy(found), backend.to_numpy(expected)) <= 1e-12
    solver = {"name": "cg", "preconditioner": "nystrom", "rtol": 1e-12}
    prepared = bl.prepare(solver, *case.at, inner_args=case.args["inner_args"])
    assert relative_error(backend.to_numpy(case.hypergradient(prepared).grad), case.grad) <= 1e-9


def test_a_warm_start(backend):
    if backend.compiles:
        pytest.skip("compiled code keeps no state")
    case, solver = split(ridge(backend), "a list"), bl.WarmStart("cg")
    case.hypergradient(solver)
    assert case.hypergradient(solver).info.steps == 0


def test_diagnosing(backend):
    report = bl.diagnose(*split(ridge(backend), "a list").at, **split(ridge(backend), "a list").args)
    assert report.ok, report
    assert report.residual <= 1e-4


@pytest.mark.parametrize("reference", ["exact", "finite-differences"])
def test_checking(backend, reference):
    case = split(ridge(backend), "a list")
    check_hypergradient(*case.at, **case.args, reference=reference)


def test_a_search(backend):
    values = []
    for case in (ridge(backend), split(ridge(backend), "a list")):
        fit = bl.scipy_fit(case.problem, inner_args=case.args["inner_args"])
        found = bl.minimize(case.problem, case.hparams, fit=fit, params0=case.params, **case.args, maxiter=5)
        values.append(found.fun)
    assert relative_error(values[1], values[0]) <= 1e-6


def test_a_hyperparameter_of_one_micro_batch(autodiff):
    """The others do not depend on it."""
    xp, one = namespace(autodiff), autodiff.from_numpy(np.array(1.0))

    def inner(w, h, factor, is_last):
        return (w["a"] ** 2).sum() * factor + (h["a"] * w["a"].sum() if is_last else 0.0)

    def outer(w, h, target):
        return ((w["a"] - target) ** 2).sum()

    w = {"a": xp.zeros_like(one) + autodiff.from_numpy(np.ones(2))}
    h = {"a": one}
    parts = bl.MicroBatches([(one, False), (one, False), (one, True)], weights=[1, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", bl.DependenceWarning)
        hg = bl.hypergradient(bl.Problem(inner, outer), w, h, inner_args=parts, outer_args=(one * 0,))
    assert relative_error(hg.grad["a"], -2 * (1 / 3)) <= 1e-12  # H = 2I, v = (1, 1), and ∂²L/∂λ∂w = (1, 1)/3


def test_unused_hyperparameters_are_named(autodiff):
    w, h, (x, y, index) = images(autodiff)
    whole, h = ((x, index), y), {**h, "idle": h["weights"]}
    parts = bl.MicroBatches(whole, size=4)
    if autodiff.name == "torch":
        h["idle"] = h["idle"].clone()
    with pytest.warns(bl.DependenceWarning, match=r"depends on hparams\['idle'\]: its hypergradient is zero"):
        bl.hypergradient(
            network_problem(autodiff, "hessian"), w, h, inner_args=parts, outer_args=parts,
            solver=bl.MINRES(damping=1.0),
        )  # fmt: skip


def test_a_nan_is_located(backend):
    case = ridge(backend)
    X, y = (backend.to_numpy(a).copy() for a in case.args["inner_args"])
    X[5, 1] = np.nan
    case.args["inner_args"] = bl.MicroBatches([tuple(map(backend.from_numpy, b)) for b in cut((X, y), 4)])
    with pytest.raises(bl.SolverError, match=r"nan or infinity in 1 of the 20 entries of inner_args.*\[1\]\[0\]"):
        case.hypergradient()


class Noisy(Loader):
    """A loader with random augmentation."""

    def __iter__(self):
        rng = np.random.default_rng()
        return ([a + 1e-2 * rng.standard_normal() for a in batch] for batch in self.batches)


class Shuffled(Loader):
    """A loader that shuffles, with all examples in each pass."""

    rng = np.random.default_rng(0)

    def __iter__(self):
        X, y = self.batches
        order = self.rng.permutation(len(X))
        return iter(cut((X[order], y[order]), 2, 4, 7))


def test_data_that_change_between_passes_are_refused(backend):
    if backend.compiles:
        pytest.skip("the data are arguments of one compiled function")
    case = ridge(backend)
    case.args["inner_args"] = bl.MicroBatches(Noisy(cut(case.args["inner_args"], 4)))
    with pytest.raises(ValueError, match=r"differs between two passes over the micro-batches.*random augmentation"):
        case.hypergradient()


def test_a_loader_that_shuffles_all_examples_is_right():
    """The mean over all examples does not depend on their order."""
    case = ridge()
    case.args["inner_args"] = bl.MicroBatches(Shuffled(case.args["inner_args"]))
    assert relative_error(case.hypergradient(bl.CG(rtol=1e-12)).grad, case.grad) <= 1e-9


BAD = {
    "a tuple without size": (
        lambda X, y: MicroBatches((X, y)),
        TypeError,
        r"inner_args: MicroBatches takes a tuple of",
    ),
    "a list with size": (lambda X, y: MicroBatches([(X, y)], size=2), TypeError, "or a list or a loader.*size=2"),
    "an array": (lambda X, y: MicroBatches(X), TypeError, "a list of micro-batches|compiled code cannot read"),
    "a generator": (lambda X, y: MicroBatches((X, y) for _ in "ab"), TypeError, "only once|compiled code cannot read"),
    "a number": (lambda X, y: MicroBatches(3), TypeError, "got int|read a int"),
    "an empty list": (lambda X, y: MicroBatches([]), ValueError, "the data have 0 micro-batches"),
    "no size": (lambda X, y: MicroBatches((X, y), size=0), ValueError, "MicroBatches.size: expected an integer > 0"),
    "a size that is no integer": (lambda X, y: MicroBatches((X, y), size=2.0), ValueError, "an integer > 0, got 2.0"),
    "an unknown reduction": (
        lambda X, y: MicroBatches([(X, y)], reduction="max"),
        ValueError,
        "MicroBatches.reduction",
    ),
    "too few weights": (lambda X, y: MicroBatches([(X, y)] * 2, weights=[1.0]), ValueError, "2 micro-batches and 1 w"),
    "too many weights": (
        lambda X, y: MicroBatches((X, y), 5, weights=[1.0] * 3),
        ValueError,
        "2 micro-batches and 3 w",
    ),
    "unclear sizes": (lambda X, y: MicroBatches([(X, y[:2])]), ValueError, r"the lengths are \[0\]: 9 and \[1\]: 2"),
    "no array": (lambda X, y: MicroBatches([(1, 2)]), ValueError, "the lengths are none. Pass weights="),
    "another number of arguments": (lambda X, y: MicroBatches([(X,)]), TypeError, "inner_args has 1 entries"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_way_out(backend, case):
    if case == "another number of arguments" and backend.name == "numpy":
        pytest.skip("the methods of the object are called, not the object")
    make, error, message = BAD[case]
    point = ridge(backend)
    point.args["inner_args"] = make(*point.args["inner_args"])
    with pytest.raises(error, match=message):
        point.hypergradient()


def test_a_loader_needs_as_many_weights(backend):
    case = ridge(backend)
    batches = cut(case.args["inner_args"], 2, 5)
    case.args["inner_args"] = bl.MicroBatches(Loader(batches), weights=[1.0, 1.0])
    match = "compiled code cannot read a Loader. Pass a list" if backend.compiles else "3 micro-batches and 2 weights"
    with pytest.raises((TypeError, ValueError), match=match):
        case.hypergradient()


def test_the_error_about_a_list_names_micro_batches(backend):
    case = ridge(backend)
    case.args["inner_args"] = [tuple(batch) for batch in cut(case.args["inner_args"], 3, 6)]
    with pytest.raises(TypeError, match=re.escape("pass inner_args=bl.MicroBatches(batches)")):
        case.hypergradient()
