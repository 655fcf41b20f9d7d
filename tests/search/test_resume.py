"""A search that is interrupted and resumed."""

import json
import pickle
from functools import partial

import numpy as np
import pytest
from frameworks import namespace

import bilevel as bl


def search(backend, **options):
    """Tune a penalty per feature of a ridge regression, with an inexact inner training from a warm start."""
    rng = np.random.default_rng(0)
    X, noise, X_val = (rng.standard_normal(shape) for shape in [(30, 4), 30, (30, 4)])
    y, y_val = X.sum(1) + noise, X_val.sum(1)
    data = {name: backend.from_numpy(x) for name, x in {"X": X, "y": y, "X_val": X_val, "y_val": y_val}.items()}
    xp = namespace(backend)

    def fit(h, w):
        w = backend.from_numpy(np.zeros(4)) if w is None else w
        for _ in range(60):
            w = w - (data["X"].T @ (data["X"] @ w - data["y"]) / 30 + xp.exp(h) * w) / (4 + xp.exp(h))
        return w

    return partial(
        bl.minimize,
        bl.problems.ridge(),
        backend.from_numpy(np.full(4, -2.0)),
        fit=fit,
        inner_args=(data["X"], data["y"]),
        outer_args=(data["X_val"], data["y_val"]),
        **options,
    )


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG"])
def test_a_resumed_search_has_the_same_bits(backend, method):
    minimize = search(backend, method=method)
    whole = minimize(maxiter=8)
    state = pickle.loads(pickle.dumps(minimize(maxiter=3).state))
    seen = []
    resumed = minimize(maxiter=8, resume=state, callback=lambda r: seen.append(r.nit))
    for name in ("x", "params", "jac"):
        assert backend.to_numpy(resumed[name]).tobytes() == backend.to_numpy(whole[name]).tobytes()
    assert (resumed.fun, resumed.nit, resumed.nfev) == (whole.fun, whole.nit, whole.nfev)
    assert resumed.history == whole.history
    assert seen == [*range(4, whole.nit + 1)]


def test_from_the_state_of_a_callback():
    minimize, states = search(bl.get_backend("numpy")), []
    whole = minimize(maxiter=6, callback=lambda r: states.append(r.state))
    for state in states:
        assert minimize(maxiter=6, resume=state).x.tobytes() == whole.x.tobytes()


def test_a_fit_is_not_repeated():
    minimize = search(bl.get_backend("numpy"))
    first, whole = minimize(maxiter=3), minimize(maxiter=8)
    calls, fit = [], minimize.keywords["fit"]
    minimize(maxiter=8, resume=first.state, fit=lambda h, w: calls.append(0) or fit(h, w))
    assert len(calls) == whole.nfev - first.nfev


@pytest.mark.parametrize("state", [{}, [1], {"format": 0}, "state.pt"])
def test_what_is_no_state(state):
    with pytest.raises(ValueError, match=r"resume: expected the state of a result of bl.minimize"):
        search(bl.get_backend("numpy"))(resume=state)


def test_a_state_whose_arrays_have_become_lists():
    minimize = search(bl.get_backend("numpy"))
    state = json.loads(json.dumps(minimize(maxiter=2).state, default=np.ndarray.tolist))
    with pytest.raises(TypeError, match=r"resume: expected arrays in the state\. JSON makes lists of them"):
        minimize(maxiter=3, resume=state)


def test_a_state_of_another_search():
    minimize = search(bl.get_backend("numpy"))
    state = minimize(maxiter=3).state
    with pytest.raises(ValueError, match=r"resume: the state is of another search\. Pass the same problem, hparams0"):
        minimize(maxiter=3, bounds=(-2.1, 0.0), resume=state)
