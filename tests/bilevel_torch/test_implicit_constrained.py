"""`implicit_minimizer` with constraints: against solutions in closed form."""

import pytest
from frameworks import relative_error

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")

# PyTorch's forward mode compiles its own rules when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

H = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
COSTS = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)


def distance(w, h, radius=2.0):
    return 0.5 * ((w - h) ** 2).sum()


def outside(w, h, radius=2.0):
    return (w @ w - radius**2).reshape(1)


def nearest(h, radius=2.0):
    """The nearest point of a ball."""
    return h * radius / h.norm()


@bilevel_torch.implicit_minimizer(distance, bl.MINRES(rtol=1e-13), inequality=outside)
def in_ball(h, *, radius=2.0):
    problem = bl.Constrained(distance, distance, inequality=outside)
    return bl.with_multipliers(problem, nearest(h, radius), h, inner_args=(radius,))


def test_two_orders_with_a_curved_inequality():
    found, expected = (lambda h: COSTS @ in_ball(h)["w"]), (lambda h: COSTS @ nearest(h))
    for derivative in (torch.func.grad, torch.func.jacfwd, lambda f: torch.func.jacrev(torch.func.grad(f))):
        assert relative_error(derivative(found)(H), derivative(expected)(H)) <= 1e-9


def test_a_keyword_argument_reaches_the_constraint():
    radius = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (COSTS @ in_ball(H, radius=radius)["w"]).backward()
    assert relative_error(radius.grad, COSTS @ H / H.norm()) <= 1e-9


def test_cg_is_an_error():
    solve = bilevel_torch.implicit_minimizer(distance, inequality=outside)(in_ball.__wrapped__)
    with pytest.raises(TypeError, match=r"CG relies on a positive definite .* Use solver=\"minres\""):
        solve(H.clone().requires_grad_())["w"].sum().backward()
