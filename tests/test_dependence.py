"""Warnings about arguments without influence, and about params that are no arguments."""

import warnings

import numpy as np
import pytest
from frameworks import framework, namespace

import bilevel as bl


@pytest.fixture(params=["torch", "jax"])
def autodiff(request):
    return framework(request.param)


METHODS = ["cg", bl.Unrolled(steps=2, step_size=0.1), bl.Unrolled(steps=2, step_size=0.1, mode="forward")]


def ones(backend, *names):
    return {name: backend.from_numpy(np.ones(2)) for name in names}


def inner(xp, used=("a",)):
    """Return L with a penalty by the hyperparameters of these names."""
    return lambda w, h: ((w["w"] - 1) ** 2).sum() + sum((xp.exp(h[name]) * w["w"] ** 2).sum() for name in used)


def outer(w, h):
    return ((w["w"] - 2) ** 2).sum()


def call(backend, inner, outer, params=("w",), hparams=("a", "b"), **options):
    problem = bl.Problem(inner, outer)
    return bl.hypergradient(problem, ones(backend, *params), ones(backend, *hparams), on_failure="ignore", **options)


@pytest.mark.parametrize("solver", METHODS, ids=["implicit", "reverse", "forward"])
class TestHparams:
    def test_a_leaf_that_no_objective_uses(self, autodiff, solver):
        with pytest.warns(bl.DependenceWarning) as seen:
            hg = call(autodiff, inner(namespace(autodiff)), outer, solver=solver)
        assert "Neither outer nor the gradient of inner by params depends on hparams['b']:" in str(seen[0].message)
        assert seen[0].filename == __file__
        assert len(seen) == 1
        assert autodiff.to_numpy(hg.grad["b"]).tolist() == [0, 0]

    def test_a_leaf_that_only_the_outer_objective_uses(self, autodiff, solver):
        with pytest.warns(
            bl.DependenceWarning, match=r"^hparams\['b'\] has no influence on the minimum.* from outer\."
        ):
            hg = call(
                autodiff, inner(namespace(autodiff)), lambda w, h: outer(w, h) + (h["b"] ** 2).sum(), solver=solver
            )
        assert autodiff.to_numpy(hg.grad["b"]).tolist() == [2, 2]

    def test_all_leaves_detached_with_a_penalty_on_them(self, autodiff, solver):
        xp, copies = namespace(autodiff), ones(autodiff, "a", "b")
        with pytest.warns(bl.DependenceWarning, match=r"^hparams\['a'\] and hparams\['b'\] have no influence"):
            call(
                autodiff,
                lambda w, h: inner(xp, "ab")(w, copies),
                lambda w, h: outer(w, h) + sum((x**2).sum() for x in h.values()),
                solver=solver,
            )

    def test_a_leaf_with_a_derivative_that_happens_to_be_zero(self, autodiff, solver):
        call(autodiff, inner(namespace(autodiff), "ab"), lambda w, h: outer(w, h) + 0 * h["b"].sum(), solver=solver)


class TestParams:
    @pytest.mark.parametrize("term", [lambda w: 0, lambda w: w["head"].sum()], ids=["unused", "linear"])
    def test_a_leaf_without_curvature(self, autodiff, term):
        xp = namespace(autodiff)
        with pytest.warns(
            bl.DependenceWarning, match=r"does not depend on params\['head'\], or is linear in it.*penalty"
        ):
            call(
                autodiff,
                lambda w, h: inner(xp, "ab")(w, h) + term(w),
                lambda w, h: outer(w, h) + (w["head"] ** 2).sum(),
                params=("head", "w"),
            )

    def test_a_leaf_that_no_objective_uses_is_fine(self, autodiff):
        call(autodiff, inner(namespace(autodiff), "ab"), outer, params=("head", "w"))

    def test_an_unroll_needs_no_curvature(self, autodiff):
        call(
            autodiff,
            inner(namespace(autodiff), "ab"),
            lambda w, h: outer(w, h) + (w["head"] ** 2).sum(),
            params=("head", "w"),
            solver=METHODS[1],
        )

    def test_an_outer_objective_without_them(self, autodiff):
        with pytest.warns(bl.DependenceWarning, match=r"^outer does not depend on params.*in the right order\?"):
            call(autodiff, inner(namespace(autodiff), "ab"), lambda w, h: (h["a"] ** 2).sum())


@pytest.mark.parametrize("kind", [bl.FixedPoint, bl.Root])
def test_a_leaf_of_hparams_that_no_equation_uses(autodiff, kind):
    problem = kind(lambda w, h: {"w": 0.5 * w["w"] - h["a"]}, outer)
    with pytest.warns(
        bl.DependenceWarning, match=r"^Neither outer nor the step or residual depends on hparams\['b'\]:"
    ):
        bl.hypergradient(problem, ones(autodiff, "w"), ones(autodiff, "a", "b"), solver="gmres", on_failure="ignore")


def test_a_fixed_point_may_forget_its_last_iterate(autodiff):
    problem = bl.FixedPoint(lambda w, h: {"a": 0.5 * w["a"], "b": h}, lambda w, h: (w["a"] + w["b"]).sum())
    one = autodiff.from_numpy(np.ones(2))
    hg = bl.hypergradient(problem, {"a": one, "b": 2 * one}, 3 * one, solver="gmres", on_failure="ignore")
    assert autodiff.to_numpy(hg.grad) == pytest.approx([1, 1])


def test_the_warning_can_be_switched_off(autodiff):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.DependenceWarning)
        call(autodiff, inner(namespace(autodiff)), outer)


def test_a_minimizer_in_jax_names_the_leaf():
    jax, minimizer = pytest.importorskip("jax"), pytest.importorskip("bilevel_jax").implicit_minimizer
    backend = framework("jax")
    solve = minimizer(inner(jax.numpy))(lambda h: ones(backend, "w"))
    with pytest.warns(
        bl.DependenceWarning, match=r"hparams\['b'\] has no influence on the minimum.*derivative is zero"
    ):
        grad = jax.grad(lambda h: solve(h)["w"].sum())(ones(backend, "a", "b"))
    assert grad["b"].tolist() == [0, 0]


class TestTorch:
    def tensors(self, *names):
        torch = pytest.importorskip("torch")
        return {name: torch.ones(2, dtype=torch.float64, requires_grad=True) for name in names}

    def test_a_minimizer_names_the_leaf(self):
        torch, minimizer = pytest.importorskip("torch"), pytest.importorskip("bilevel_torch").implicit_minimizer
        solve = minimizer(inner(torch))(lambda h: {"w": torch.full((2,), 0.5, dtype=torch.float64)})
        hparams = self.tensors("a", "b")
        with pytest.warns(bl.DependenceWarning, match=r"^hparams\['b'\] has no influence on the minimum.*is zero\."):
            solve(hparams)["w"].sum().backward()
        assert hparams["b"].grad.tolist() == [0, 0]

    def test_swapped_arguments_of_a_loop(self):
        bt, torch = pytest.importorskip("bilevel_torch"), pytest.importorskip("torch")
        w, h = self.tensors("w"), self.tensors("a")
        with pytest.warns(bl.DependenceWarning, match=r"^outer_loss does not depend on params.*in the right order\?"):
            bt.hypergradient(inner(torch)(w, h), outer(w, h), h, w, on_failure="ignore")

    def test_params_that_are_forgotten_in_a_loop(self):
        bt, torch = pytest.importorskip("bilevel_torch"), pytest.importorskip("torch")
        w, h, forgotten = self.tensors("w"), self.tensors("a"), torch.ones(2, 3, requires_grad=True)
        loss = inner(torch)(w, h) + (w["w"] @ forgotten.double()).sum() ** 2
        with pytest.warns(
            bl.DependenceWarning, match=r"^inner_loss depends on 1 trainable tensor .*of shapes \(2, 3\)\."
        ):
            bt.hypergradient(loss, outer(w, h), w, h)

    def test_a_part_of_the_module_as_params(self):
        torch = pytest.importorskip("torch")
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).double()
        x, params = torch.ones(4, 2, dtype=torch.float64), dict(net[1].named_parameters(prefix="1"))
        problem = bl.Problem(
            lambda w, h: (torch.func.functional_call(net, w, (x,)) ** 2).mean() + h.exp() * (w["1.weight"] ** 2).sum(),
            lambda w, h: torch.func.functional_call(net, w, (x,)).sum(),
        )
        hparams = torch.tensor(0.0, dtype=torch.float64)
        with pytest.warns(bl.DependenceWarning, match=r"2 trainable tensors.* of shapes \(3, 2\) and \(3,\)"):
            bl.hypergradient(problem, params, hparams, on_failure="ignore")
        net[0].requires_grad_(False)
        bl.hypergradient(problem, params, hparams, on_failure="ignore")

    def test_frozen_parameters_of_a_module_as_params(self):
        torch = pytest.importorskip("torch")
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).double()
        net[0].requires_grad_(False)
        x, h = torch.ones(4, 2, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        run = torch.func.functional_call
        problem = bl.Problem(
            lambda w, h: (run(net, w, (x,)) ** 2).mean() + h.exp() * sum((p**2).sum() for p in w.values()),
            lambda w, h: (run(net, w, (x,)) - 1).pow(2).mean(),
        )
        with pytest.warns(bl.DependenceWarning, match=r"next to trainable ones: 2, the first is params\['0.bias'\]"):
            bl.hypergradient(problem, dict(net.named_parameters()), h, on_failure="ignore")
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        bl.hypergradient(problem, trained, h, on_failure="ignore")
        copies = {name: p.detach() for name, p in net.named_parameters()}  # all are unknowns, as intended
        bl.hypergradient(problem, copies, h, on_failure="ignore")

    def test_hparams_that_are_computed_from_others(self):
        bt, torch = pytest.importorskip("bilevel_torch"), pytest.importorskip("torch")
        w, raw = self.tensors("w"), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        h = {"a": torch.tanh(raw)}
        bt.hypergradient(inner(torch)(w, h), outer(w, h), w, h, on_failure="ignore")
