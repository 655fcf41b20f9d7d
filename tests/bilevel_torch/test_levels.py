"""Three levels and more: the inner loss of a level calls the solution of the level below."""

import numpy as np
import pytest
from frameworks import relative_error
from scipy import optimize

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")

generator = torch.Generator().manual_seed(0)
A, B = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
a, b = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
ZERO = torch.zeros(3, dtype=torch.float64)


def lower(u, m):
    """Not quadratic, so that its third derivatives matter."""
    return 0.5 * ((A @ u - a) ** 2).sum() + 0.5 * (m.exp() * u**2).sum() + 0.05 * (u**4).sum()


def lower_fit(m):
    """Newton's method, exact to rounding."""
    m, u = m.detach(), ZERO
    for _ in range(8):
        grad = A.T @ (A @ u - a) + m.exp() * u + 0.2 * u**3
        u = u - torch.linalg.solve(A.T @ A + torch.diag(m.exp() + 0.6 * u**2), grad)
    return u


def top(options):
    """Return F as a function of λ, through u*(m*(λ))."""
    u = bilevel_torch.implicit_minimizer(lower, **options)(lower_fit)

    def middle(m, h):
        return 0.5 * ((B @ u(m) - b) ** 2).sum() + 0.5 * (h.exp() * m**2).sum() + 0.05 * (m**4).sum()

    def slope(m, h):
        m = torch.tensor(m, requires_grad=True)
        return torch.autograd.grad(middle(m, h), m)[0].numpy()

    def middle_fit(h):
        found = optimize.root(slope, np.zeros(3), args=(h.detach(),), tol=1e-13)
        assert found.success
        return torch.tensor(found.x)

    m = bilevel_torch.implicit_minimizer(middle, **options)(middle_fit)
    return lambda h: (m(h) ** 2).sum() + u(m(h)).sum()


def differences(function, h, step=1e-4):
    units = torch.eye(len(h), dtype=h.dtype)
    return np.array([(function(h + step * e) - function(h - step * e)).item() / (2 * step) for e in units])


@pytest.mark.parametrize("options", [{}, {"solver": "exact"}], ids=["default", "exact"])
def test_a_gradient_through_three_levels_is_the_difference_of_refits(options):
    value, h = top(options), torch.tensor([-0.5, 0.0, 0.4], dtype=torch.float64)
    at = h.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(at), at)
    assert relative_error(grad, differences(value, h)) <= 1e-6


def test_data_of_a_level_may_be_the_solution_of_another():
    """λ moves x* = λ², the data of w* = argmin ½‖w − x‖² + ½‖w‖² = x/2."""
    data = bilevel_torch.implicit_minimizer(lambda x, h: ((x - h**2) ** 2).sum())(lambda h: h**2)
    model = bilevel_torch.implicit_minimizer(lambda w, h, x: ((w - x) ** 2).sum() + (w**2).sum())(lambda h, x: x / 2)
    h = torch.tensor([1.0, 2.0], requires_grad=True)
    model(ZERO[:2].float(), data(h)).sum().backward()
    torch.testing.assert_close(h.grad, h.detach())


def test_a_hypergradient_through_a_loss_with_a_minimizer():
    """w* = argmin ‖s(w)‖² + Σ h w² with s(w) = w, so dF/dh = −2w/(2 + 2h) for F = Σ w."""
    solve = bilevel_torch.implicit_minimizer(lambda w, h: ((w - h) ** 2).sum())(lambda h: h.clone())
    w, h = (torch.ones(2, requires_grad=True) for _ in range(2))
    loss = (solve(w) ** 2).sum() + (h * w**2).sum()
    hg = bilevel_torch.hypergradient(loss, w.sum(), w, h, on_failure="ignore")
    torch.testing.assert_close(hg.grad, torch.full((2,), -0.5))


def test_the_frozen_parameters_of_a_module_stay_constant():
    net = torch.nn.Linear(3, 1, dtype=torch.float64)
    net.bias.requires_grad_(False)

    def loss(params, h):
        prediction = torch.func.functional_call(net, params, (A,))[:, 0]
        return ((prediction - a) ** 2).sum() + (h.exp() * params["weight"] ** 2).sum() + (params["weight"] ** 4).sum()

    def train(h):
        optimizer = torch.optim.LBFGS([net.weight], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

        def closure():
            optimizer.zero_grad()
            value = loss(dict(net.named_parameters()), h)
            value.backward()
            return value

        optimizer.step(closure)
        return dict(net.named_parameters())

    def value(h):
        return (solve(h)["weight"] ** 2).sum()

    solve = bilevel_torch.implicit_minimizer(loss, solver=bl.CG(rtol=1e-12))(train)
    h = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)

    def slope(h):
        (first,) = torch.autograd.grad(value(h), h, create_graph=True)
        return first @ torch.arange(3.0, dtype=torch.float64)

    (second,) = torch.autograd.grad(slope(h), h)
    assert relative_error(second, differences(lambda at: slope(at.detach().requires_grad_()), h.detach())) <= 1e-5
