"""`bilevel_torch.implicit_minimizer`: a training as a differentiable function of its hyperparameters."""

import pytest
from frameworks import relative_error

import bilevel as bl
from bilevel.spaces.tree import leaves

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")

generator = torch.Generator().manual_seed(0)
X, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((30, 4), (30,)))
SOLVER = bl.CG(rtol=1e-12)


def inner(w, h, X, y):
    return ((X @ w["a"] - y) ** 2).mean() / 2 + (h["penalty"].exp() * w["a"] ** 2).sum() / 2


def minimum(h, X, y):
    return torch.linalg.solve(X.T @ X / len(y) + torch.diag(h["penalty"].exp()), X.T @ y / len(y))


def train(h, X, y):
    """As people train: with an optimizer, a loss and backward()."""
    w = {"a": torch.zeros(4, dtype=torch.float64, requires_grad=True)}
    optimizer = torch.optim.LBFGS(w.values(), max_iter=100, tolerance_grad=1e-13, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = inner(w, h, X, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return w


def hparams():
    return {"penalty": torch.linspace(-2, 0, 4, dtype=torch.float64, requires_grad=True)}


def outer(w):
    return (w["a"] ** 3).sum()


def test_it_matches_the_closed_form_in_hparams_and_data():
    solve = bilevel_torch.implicit_minimizer(inner, solver=SOLVER)(train)
    (h, A), (h_closed, A_closed) = ((hparams(), X.clone().requires_grad_()) for _ in range(2))
    outer(solve(h, A, y)).backward()
    outer({"a": minimum(h_closed, A_closed, y)}).backward()
    assert relative_error(h["penalty"].grad, h_closed["penalty"].grad) <= 1e-9
    assert relative_error(A.grad, A_closed.grad) <= 1e-9


def test_gradcheck():
    solve = bilevel_torch.implicit_minimizer(inner, solver=SOLVER)(train)
    assert torch.autograd.gradcheck(
        lambda penalty: solve({"penalty": penalty}, X, y)["a"], (hparams()["penalty"],), atol=1e-6
    )


def test_the_training_runs_once_and_leaves_no_gradient_of_its_own():
    calls = []

    def counted(h, X, y):
        calls.append(h)
        return train(h, X, y)

    solve = bilevel_torch.implicit_minimizer(inner, solver=SOLVER)(counted)
    h = hparams()
    w = solve(h, X, y)
    assert h["penalty"].grad is None  # though the training calls backward() on a loss of h
    outer(w).backward()
    assert len(calls) == 1
    assert not calls[0]["penalty"].requires_grad


def test_part_of_the_result_may_go_unused():
    def two(h):
        return [h.detach() / 2, h.detach() / 3]

    def loss(w, h):
        return ((2 * w[0] - h) ** 2).sum() + ((3 * w[1] - h) ** 2).sum()

    h = torch.tensor([6.0], requires_grad=True)
    (bilevel_torch.implicit_minimizer(loss)(two)(h)[1] ** 2).sum().backward()
    assert float(h.grad) == pytest.approx(2 * 2 / 3, rel=1e-5)


def test_without_a_gradient_to_pass_on_it_is_the_training():
    solve = bilevel_torch.implicit_minimizer(inner, solver=SOLVER)(train)
    fixed = {"penalty": hparams()["penalty"].detach()}
    assert torch.equal(solve(fixed, X, y)["a"], train(fixed, X, y)["a"].detach())
    assert not solve(fixed, X, y)["a"].requires_grad


def test_a_warm_start_serves_one_backward_pass_after_the_other():
    solver = bl.WarmStart(bl.CG(rtol=1e-6))
    solve = bilevel_torch.implicit_minimizer(inner, solver=solver)(train)
    h = hparams()
    first, second = (torch.autograd.grad(outer(solve(h, X, y)), h["penalty"])[0] for _ in range(2))
    assert solver.calls == 2
    assert relative_error(second, first) <= 1e-5


def test_two_trainings_of_one_module_that_return_copies():
    net = torch.nn.Linear(1, 1, bias=False).double()
    targets = torch.tensor([1.0, 3.0], dtype=torch.float64)

    @bilevel_torch.implicit_minimizer(lambda w, h, t: ((w["weight"] - t) ** 2 + h.exp() * w["weight"] ** 2).sum())
    def fold(h, t):
        with torch.no_grad():
            net.weight.fill_(t / (1 + h.exp()))
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    h, closed = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    sum((fold(h, t)["weight"] ** 2).sum() for t in targets).backward()
    ((targets / (1 + closed.exp())) ** 2).sum().backward()
    torch.testing.assert_close(h.grad, closed.grad)


class TestArguments:
    def test_keywords_are_differentiated_too(self):
        h, closed = hparams(), hparams()
        expected = torch.autograd.grad(outer({"a": minimum(closed, X, y)}), closed["penalty"])[0]

        @bilevel_torch.implicit_minimizer(inner, solver=SOLVER)
        def keyword_train(h, X, *, y, steps=3, start=None):
            return train(h, X, y)

        start = torch.zeros(4, requires_grad=True)
        for w in (keyword_train(h, X=X, y=y, start=start), keyword_train(h, X, y=y), keyword_train(X=X, h=h, y=y)):
            found = torch.autograd.grad(outer(w), h["penalty"])[0]
            assert relative_error(found, expected) <= 1e-9
        A, A_closed = (X.clone().requires_grad_() for _ in range(2))
        outer(keyword_train(h, X=A, y=y, start=start)).backward()
        outer({"a": minimum(closed, A_closed, y)}).backward()
        assert relative_error(A.grad, A_closed.grad) <= 1e-9
        assert not start.grad.any()  # the start does not change the minimum

    def test_so_are_defaults(self):
        scale = torch.tensor(2.0, requires_grad=True)
        solve = bilevel_torch.implicit_minimizer(lambda w, h, by: ((w - h * by) ** 2).sum())(lambda h, by=scale: h * by)
        solve(torch.ones(3)).sum().backward()
        assert scale.grad == 3.0

    def test_arguments_that_do_not_fit_raise_before_the_training(self):
        calls = []
        solve = bilevel_torch.implicit_minimizer(inner)(lambda h, X: calls.append(1))
        with pytest.raises(TypeError, match=r"inner\(w, h, X, y\): missing a required argument: 'y'\. The inner loss"):
            solve(hparams(), X)
        with pytest.raises(TypeError, match=r"the training\(h, X\): got an unexpected keyword argument 'x'"):
            solve(hparams(), X, x=X)
        assert not calls

    def test_a_hyperparameter_without_influence_is_named(self):
        h = {**hparams(), "fixed": torch.ones(1), "idle": torch.ones(1, requires_grad=True)}
        w = bilevel_torch.implicit_minimizer(inner, solver=SOLVER)(train)(h, X, y)
        with pytest.warns(bl.DependenceWarning, match=r"^hparams\['idle'\] has no influence on the minimum"):
            outer(w).backward()
        assert relative_error(h["penalty"].grad, gradient()) <= 1e-9
        assert not h["idle"].grad.any()

    def test_an_auxiliary_result_comes_back_without_its_graph(self):
        @bilevel_torch.implicit_minimizer(inner, solver=SOLVER, has_aux=True)
        def with_history(h, X, y):
            w = train(h, X, y)
            return w, {"loss": inner(w, h, X, y), "epochs": [1, 2], "optimizer": torch.optim.SGD(w.values(), 0.1)}

        h = hparams()
        w, aux = with_history(h, X, y)
        assert aux["epochs"] == [1, 2]
        assert not aux["loss"].requires_grad
        outer(w).backward()
        assert relative_error(h["penalty"].grad, gradient()) <= 1e-9


def gradient():
    closed = hparams()
    return torch.autograd.grad(outer({"a": minimum(closed, X, y)}), closed["penalty"])[0]


def test_frozen_parameters_of_a_module_are_constants():
    """The first layer stays as it is. The derivative of the second one has a closed form."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1, bias=False)).double()
    net[0].requires_grad_(False)
    Z = net[:2](X)

    def loss(w, decay):
        assert not w["0.weight"].requires_grad
        out = torch.func.functional_call(net, w, (X,))[:, 0]
        return ((out - y) ** 2).mean() + decay.exp() * sum((p**2).sum() for p in w.values())

    def ridge(decay):
        return torch.linalg.solve(Z.T @ Z / len(y) + decay.exp() * torch.eye(3).double(), Z.T @ y / len(y))

    def fit(decay):
        with torch.no_grad():
            net[2].weight.copy_(ridge(decay)[None])
        return dict(net.named_parameters())

    warm = bl.WarmStart(SOLVER)
    decay, closed = (torch.tensor(-1.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = bilevel_torch.implicit_minimizer(loss, solver=warm)(fit)(decay)
    ((w["2.weight"] ** 3).sum() + w["0.weight"].sum()).backward()
    (ridge(closed) ** 3).sum().backward()
    assert relative_error(decay.grad, closed.grad) <= 1e-9
    assert [t.shape for t in leaves(warm.adjoint)] == [(1, 3)]


class TestErrors:
    def test_unrolled_is_no_linear_solver(self):
        with pytest.raises(TypeError, match="Unrolled runs inner steps"):
            bilevel_torch.implicit_minimizer(inner, solver="unrolled")

    def test_an_inner_loss_that_runs_a_module_itself(self):
        net = torch.nn.Linear(4, 1)
        solve = bilevel_torch.implicit_minimizer(lambda w, h: h * net(X.float()).pow(2).mean())(
            lambda h: dict(net.named_parameters())
        )
        w = solve(torch.ones((), requires_grad=True))
        with pytest.raises(ValueError, match=r"inner was computed with another tensor than params.*functional_call"):
            w["weight"].sum().backward()

    def test_hparams_that_are_closed_over(self):
        h = hparams()
        solve = bilevel_torch.implicit_minimizer(lambda w, _, X, y: inner(w, h, X, y), solver=SOLVER)(train)
        with pytest.raises(ValueError, match=r"Neither F nor ∂L/∂w depends on .*closed over"):
            outer(solve(h, X, y)).backward()

    @pytest.mark.parametrize(
        ("result", "text"),
        [
            (
                lambda w: {**w, "epochs": 3},
                r"my_training returned a dict, where \['epochs'\] is an int\. Return only the",
            ),
            (lambda w: (w, 0.5), r"my_training returned a tuple of 2, where \[1\] is a float\. .*has_aux=True"),
            (lambda w: None, r"my_training returned None\. Return the params"),
            (lambda w: torch.nn.Linear(4, 1), r"returned a Linear\. Return the params.*named_parameters"),
        ],
        ids=["dict", "tuple", "none", "module"],
    )
    def test_a_training_that_returns_something_else(self, result, text):
        @bilevel_torch.implicit_minimizer(inner)
        def my_training(h, X, y):
            return result({"a": torch.ones(4)})

        with pytest.raises(TypeError, match=text):
            my_training(hparams(), X, y)

    def test_a_training_that_returns_its_loss_too(self):
        @bilevel_torch.implicit_minimizer(inner)
        def my_training(h, X, y):
            return {"a": torch.ones(4, dtype=torch.float64)}, torch.zeros(())

        w, _ = my_training(hparams(), X, y)
        with pytest.raises(TypeError) as caught:
            outer(w).backward()
        found = "inner received params[0]['a'] of shape (4,) and params[1] of shape ()."
        assert caught.value.__notes__[0] == f"my_training returned a tuple of 2, and {found}"

    def test_the_decorator_in_the_wrong_place(self):
        direct = bilevel_torch.implicit_minimizer(train)
        with pytest.raises(
            TypeError, match=r"implicit_minimizer\(train\) expects a training function, got a dict, a Tensor"
        ):
            direct(hparams(), X, y)
        with pytest.raises(TypeError, match=r"got a str\. Write implicit_minimizer\(inner, solver=\"cg\"\)"):
            bilevel_torch.implicit_minimizer("cg")

    def test_a_module_trained_on_before_the_backward_pass(self):
        net = torch.nn.Linear(1, 1)
        solve = bilevel_torch.implicit_minimizer(lambda w, h: ((w["weight"] - h) ** 2).sum() + (w["bias"] ** 2).sum())(
            lambda h: dict(net.named_parameters())
        )
        w = solve(torch.ones((), requires_grad=True))
        with torch.no_grad():
            net.weight.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            w["weight"].sum().backward()
        assert "for each fold, return copies" in caught.value.__notes__[0]

    def test_a_failed_solve_warns_and_raises_in_the_backward_pass(self):
        for on_failure, caught in (
            ("warn", pytest.warns(bl.SolverWarning, match="CG: stopped after 1 step")),
            ("raise", pytest.raises(bl.SolverError, match="CG: stopped after 1 step")),
        ):
            solve = bilevel_torch.implicit_minimizer(inner, solver=bl.CG(maxiter=1), on_failure=on_failure)(train)
            loss = outer(solve(hparams(), X, y))
            with caught:
                loss.backward()

    def test_a_third_derivative_raises(self):
        solve = bilevel_torch.implicit_minimizer(inner, solver=SOLVER)(train)
        h = hparams()
        (first,) = torch.autograd.grad(outer(solve(h, X, y)), h["penalty"], create_graph=True)
        assert relative_error(first.detach(), gradient()) <= 1e-9
        (second,) = torch.autograd.grad(first.sum(), h["penalty"], create_graph=True)
        with pytest.raises(RuntimeError, match=r"two derivatives in reverse mode.*bilevel_jax"):
            second.sum().backward()

    def test_inference_mode(self):
        solve = bilevel_torch.implicit_minimizer(inner)(train)
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*zero without an error"):
            solve(hparams(), X, y)
