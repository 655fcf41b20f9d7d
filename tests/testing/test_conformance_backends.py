"""The suite of backends: each law catches the fault that it is there for."""

import itertools
from contextlib import contextmanager
from copy import copy

import numpy as np
import pytest
from frameworks import failures, framework

import bilevel as bl
from bilevel.linearization import LinearizedMap
from bilevel.spaces.tree import tree_map
from bilevel.testing import check_backend

SEEDS = itertools.count()
NUMPY = framework("numpy")
CUT_OFF = {"inner_cut_off-numpy", "outer_cut_off-numpy"}  # of numpy's backend: objectives bring their derivatives
Space, Backend = type(NUMPY.space(np.zeros(1))), type(NUMPY)


class SpaceFaults:
    """One fault each, under the name of the check that must find it."""

    class dot(Space):
        def dot(self, x, y):
            return super().dot(x, y) + np.float64(1e-3)

    class axpy(Space):
        def axpy(self, alpha, x, y):
            return tree_map(lambda a, b: np.float64(alpha) * a + b, x, y)

    class scale(Space):
        def scale(self, alpha, x):
            return x if alpha == 1 else super().scale(-alpha, x)

    class axpby_where(Space):
        def axpby_where(self, flag, alpha, x, y, beta=1.0):
            return super().axpby_where(flag, alpha, x, y)

    class zeros(Space):
        def zeros(self):
            return self.scale(0.0, self.like)

    class map_entries(Space):
        def map(self, function, x, *rest):
            return super().map(function, x, *(x for _ in rest))

    class where(Space):
        def where(self, flag, x, y):
            return self.axpy(float(flag), x, self.scale(1 - float(flag), y))

    class normal_draws(Space):
        def normal(self, seed, count=None):
            return super().normal(next(SEEDS), count)

    class max_abs(Space):
        def max_abs(self, x):
            return np.nan_to_num(super().max_abs(x))

    class isfinite(Space):
        def isfinite(self, x):
            return np.bool_(not np.isnan(self.ravel(x)).any())

    class eps_and_size(Space):
        eps = 2.0**-52

    class mixed_precision(Space):
        eps = property(lambda self: float(min(np.finfo(leaf.dtype).eps for leaf in self.leaves(self.like))))

    class ravel_unravel(Space):
        def unravel(self, array):
            return super().unravel(array[::-1])

    class materialise(Space):
        def materialise(self, operator):
            return super().materialise(operator).T

    class numpy_callback(Space):
        def numpy_callback(self, function, *arrays):
            return function(*arrays)

    class stacks(Space):
        def get(self, stack, i):
            return super().get(stack, max(i - 1, 0))

    class while_loop(Space):
        def while_loop(self, live, body, state, max_steps):
            return super().while_loop(live, body, state, max_steps + 1)

    class scan(Space):
        def scan(self, body, state, xs, length, reverse=False):
            state, ys = super().scan(body, state, xs, length, reverse)
            return state, ys[::-1]

    class scan_of_no_steps(Space):
        def scan(self, body, state, xs, length, reverse=False):
            return super().scan(body, state, xs, max(length, 1), reverse)

    class cond(Space):
        def cond(self, flag, body, state):
            return body(state)

    class sequence(Space):
        def sequence(self, items):
            return lambda i: items[min(i, len(items) - 1)]

    class scalar_functions(Space):
        class xp:
            def __getattr__(self, name):
                return getattr(np, name) if name != "exp2" else np.exp

        xp = xp()


class BackendFaults:
    class name_of_framework(Backend):
        name = "no_such_module"

    class owns(Backend):
        def owns(self, leaf):
            return super().owns(leaf) or isinstance(leaf, float)

    class leaves_and_paths(Backend):
        def leaves(self, tree):
            return super().leaves(tree)[::-1]

    class shapes_and_dtypes(Backend):
        def from_numpy(self, array):
            return np.atleast_1d(array)

    class is_floating(Backend):
        def is_floating(self, leaf):
            return True

    class devices(Backend):
        def devices(self):
            return []

    class to_host(Backend):
        def to_host(self, scalar):
            return float(scalar)

    class numpy_round_trip(Backend):
        def to_numpy(self, array):
            return np.asarray(array, np.float64)

    class closed_form(Backend):
        def inner(self, *args):
            found = super().inner(*args)
            return found._replace(vjp_params=lambda v: 2 * found.vjp_params(v))

    class nested_trees(Backend):
        def inner(self, *args):
            found = super().inner(*args)
            return found._replace(vjp_params=lambda v: tree_map(np.ravel, found.vjp_params(v)))

    class differences(Backend):
        def inner(self, objective, params, hparams, args):
            found = super().inner(objective, params, hparams, args)
            if isinstance(params, dict):  # right on vectors
                of_hparams = self.space(hparams)
                return found._replace(vjp_hparams=lambda v: of_hparams.scale(-1.0, found.vjp_hparams(v)))
            return found

    class isolated(Backend):
        @contextmanager
        def isolated(self, inputs, double):
            yield lambda params, hparams: inputs

    class fixed_point(Backend):
        def jacobian(self, *args, label):
            found = super().jacobian(*args, label=label)
            return found._replace(vjp_params=lambda v: found.vjp_params(2 * v))

    class gauss_newton(Backend):
        def gauss_newton(self, inner, params, hparams, args):
            X, y = args
            return LinearizedMap(X.T @ (X @ params - y), lambda v: X.T @ (X @ v), lambda v: params * v)

    class none_without_direct_term(Backend):
        def outer(self, objective, params, hparams, args, **options):
            found = super().outer(objective, params, hparams, args, **options)
            return found._replace(grad_hparams=0 * hparams) if found.grad_hparams is None else found

    class hparams_without_influence(none_without_direct_term):
        pass

    class none_without_cross_term(Backend):
        def inner(self, objective, params, hparams, args):
            found = super().inner(objective, params, hparams, args)

            def vjp_hparams(v):
                product = found.vjp_hparams(v)
                return 0 * hparams if product is None else product

            return found._replace(vjp_hparams=vjp_hparams)

    class products_are_linear_and_repeat(Backend):
        def inner(self, *args):
            found = super().inner(*args)
            return found._replace(vjp_params=lambda v: found.vjp_params(v) * (1 + 1e-9 * next(SEEDS)))

    class outer_not_scalar(Backend):
        def outer(self, objective, params, hparams, args, **options):
            return super().outer(Summed(objective), params, hparams, args, **options)

    class inputs_untouched(Backend):
        def inner(self, objective, params, hparams, args):
            found = super().inner(objective, params, hparams, args)
            params *= 1.5
            return found

    class hypergradient_cg(Backend):
        def run(self, function, *args, **options):
            found = super().run(function, *args, **options)
            return found._replace(grad=-found.grad) if isinstance(found, bl.Hypergradient) else found


class Summed:
    def __init__(self, objective):
        self.objective, self.grad = objective, objective.grad

    def __call__(self, *args):
        return np.sum(self.objective(*args))


def faults(*groups):
    found = ((name, fault) for group in groups for name, fault in vars(group).items() if isinstance(fault, type))
    return [pytest.param(name, fault, id=name) for name, fault in found]


@pytest.mark.parametrize(("name", "fault"), faults(SpaceFaults, BackendFaults))
def test_a_fault_of_a_backend_is_caught_by_the_check_that_names_it(name, fault):
    if issubclass(fault, Space):
        backend = copy(NUMPY)
        backend.space = fault
    else:
        backend = fault()
    said = failures(check_backend(backend))
    assert any(check.startswith(f"{name}-") for check in said), sorted(said)


def test_every_law_of_a_backend_has_a_fault_that_it_catches():
    laws = {check.name.partition("-")[0] for check in check_backend(BackendFaults.gauss_newton())}
    broken_in_numpy_itself = {"inner_cut_off", "outer_cut_off"}
    solvers = {law for law in laws if law.startswith("hypergradient_")} - {"hypergradient_cg"}
    assert laws - broken_in_numpy_itself - solvers == {fault.id for fault in faults(SpaceFaults, BackendFaults)}


def test_a_problem_of_ones_own_is_compared_with_differences():
    X, y = np.random.default_rng(0).standard_normal((8, 3)), np.arange(8.0)
    ridge, w, lam = bl.problems.ridge(), np.ones(3), np.zeros(3)
    args = {"inner_args": (X, y), "outer_args": (X, y)}

    class Wrong(type(ridge.inner)):
        def cross_vjp(self, *args):
            return 2 * super().cross_vjp(*args)

    wrong = bl.Problem(Wrong(*vars(ridge.inner).values()), ridge.outer)
    for problem, expected in ((ridge, set()), (wrong, {"differences-numpy-float64", "differences-numpy-float32"})):
        assert set(failures(check_backend(NUMPY, problem, w, lam, **args))) - CUT_OFF == expected


def test_mistakes_in_the_call_of_check_backend_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'normal_draws'"):
        check_backend(NUMPY, excused={"normal": ""})
    with pytest.raises(TypeError, match="backend: expected a name or an object"):
        check_backend(3)
    with pytest.raises(ValueError, match="params is None"):
        check_backend(NUMPY, bl.problems.ridge())
