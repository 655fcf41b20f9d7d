"""Errors that locate a nan or an infinity, and name its likely causes."""

import numpy as np
import pytest
from frameworks import framework, namespace

import bilevel as bl

SECOND = r"has no second derivative at this point: a root, a norm.*Use sqrt\(x \+ 1e-12\)"
FIRST = r"has no derivative at this point: a root, a norm"


@pytest.fixture(params=["torch", "jax"])
def autodiff(request):
    return framework(request.param)


def norm_of_b(xp, w):
    return (w["b"] ** 2).sum() ** 0.5


# (term of the inner loss, term of the outer loss, text); the other terms are finite
PLACES = {
    "gradient of a root at zero": (
        norm_of_b,
        None,
        rf"its gradient ∂L/∂w is nan or infinite in params\['b'\].*{FIRST}",
    ),
    "second derivative of a power at zero": (
        lambda xp, w: (abs(w["b"]) ** 1.5).sum(),
        None,
        rf"products with the derivative of ∂L/∂w by params are nan or infinite in params\['b'\].*{SECOND}",
    ),
    "where with an invalid branch": (
        lambda xp, w: xp.where(w["a"] > 2, xp.sqrt(w["a"] - 2), 0.0).sum(),
        None,
        rf"The inner loss is finite, but its gradient ∂L/∂w is nan or infinite in params\['a'\].*{FIRST}.*where\(\)",
    ),
    "overflow": (lambda xp, w: xp.exp(1000 * w["a"]).sum(), None, "The inner loss is nan or infinite.*overflow"),
    "outer loss": (None, lambda xp, w: xp.log(w["b"]).sum() * 0, "The outer loss is nan or infinite.*logarithm"),
    "outer gradient": (None, norm_of_b, rf"The outer loss is finite, but its gradient ∂F/∂w is nan.*{FIRST}"),
}


def losses(xp, place):
    inner_term, outer_term, _ = PLACES[place]

    def inner(w, h, *data):
        term = inner_term(xp, w) if inner_term else 0.0
        return ((w["a"] - h) ** 2).sum() + (w["b"] ** 2).sum() + term

    def outer(w, h, *data):
        return (w["a"] ** 2).sum() + (outer_term(xp, w) if outer_term else 0.0)

    return inner, outer


def point(backend):
    one = backend.from_numpy(np.ones(2))
    return {"a": one, "b": 0 * one}, backend.from_numpy(np.ones(2))


@pytest.mark.parametrize("place", PLACES)
def test_functions(autodiff, place):
    problem = bl.Problem(*losses(namespace(autodiff), place))
    with pytest.raises(bl.SolverError, match=f"(?s)^CG: .*{PLACES[place][2]}.*No hypergradient is returned"):
        bl.hypergradient(problem, *point(autodiff))


@pytest.mark.parametrize("place", PLACES)
def test_a_loop(place):
    torch, bilevel_torch = pytest.importorskip("torch"), pytest.importorskip("bilevel_torch")
    params, h = point(framework("torch"))
    params, h = {name: w.clone().requires_grad_() for name, w in params.items()}, h.requires_grad_()
    inner, outer = losses(torch, place)
    with pytest.raises(bl.SolverError, match=f"(?s)^CG: .*{PLACES[place][2]}"):
        bilevel_torch.backward(inner(params, h), outer(params, h), params, h)
    assert h.grad is None


@pytest.mark.parametrize("solver", ["cg", "neumann", "exact", bl.Unrolled(steps=2, step_size=0.1)])
@pytest.mark.parametrize("role", ["inner_args", "outer_args"])
def test_data(backend, role, solver):
    X, y = np.eye(3), np.ones(3)
    sound, bad = (backend.from_numpy(a) for a in (X, y)), np.array([1.0, np.nan, 1.0])
    sound = tuple(sound)
    data = {"inner_args": sound, "outer_args": sound} | {role: (sound[0], backend.from_numpy(bad))}
    w, h = (backend.from_numpy(a) for a in (np.ones(3), np.zeros(3)))
    with pytest.raises(bl.SolverError, match=rf"in 1 of the 3 entries of {role}\[1\]\. Clean the data"):
        bl.hypergradient(bl.problems.ridge(), w, h, solver=solver, **data)


@pytest.mark.parametrize("name", ["params", "hparams"])
def test_arguments(backend, name):
    data = tuple(backend.from_numpy(a) for a in (np.eye(3), np.ones(3)))
    at = {"params": np.ones(3), "hparams": np.zeros(3)}
    at[name][2] = np.nan
    at = {key: backend.from_numpy(value) for key, value in at.items()}
    with pytest.raises(bl.SolverError, match=rf"infinity in 1 of the 3 entries of {name}\. .*(Train|Start)"):
        bl.hypergradient(bl.problems.ridge(), **at, inner_args=data, outer_args=data)


def test_a_linearization_by_hand():
    lin = bl.Linearization(1.0, np.array([1.0, np.nan]), None, lambda v: v, lambda v: v)
    with pytest.raises(bl.SolverError, match="gradient ∂F/∂w is nan or infinite in 1 of the 2 entries of params"):
        bl.hypergradient_from(lin)


def test_an_equation(autodiff):
    one = autodiff.from_numpy(np.ones(2))
    problem = bl.FixedPoint(lambda w, h: namespace(autodiff).log(w - 2) * h, lambda w, h: (w**2).sum())
    with pytest.raises(bl.SolverError, match="The residual is nan or infinite in params"):
        bl.hypergradient(problem, one, 2 * one, solver="gmres")
