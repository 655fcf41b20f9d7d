"""`implicit_minimizer` with a proximal operator or a projection: against re-solved problems, in both modes, twice."""

import numpy as np
import pytest
from frameworks import moved, relative_error
from proximal_cases import Case, Distance, Quadratic

import bilevel as bl
from bilevel import projections, prox

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")

# PyTorch's forward mode compiles its own rules when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

TIGHT = bl.CG(rtol=1e-13)
GROUPS = [0, 0, 1, 2, 2, 1, 0, 1]
CASES = {
    "l1, per feature": (bl.Proximal, prox.l1("penalty"), {"penalty": np.linspace(-1.5, 0.5, 8)}),
    "elastic net": (bl.Proximal, prox.elastic_net(), {"l1": -0.5, "l2": -1.0}),
    "group lasso": (bl.Proximal, prox.group_lasso(GROUPS, "penalty"), {"penalty": [0.9, -0.5, 1.2]}),
    "total variation": (bl.Proximal, prox.total_variation("penalty"), {"penalty": -0.5}),
    "nuclear norm": (bl.Proximal, prox.nuclear_norm("penalty"), {"penalty": 0.9}, (6, 4)),
    "box": (bl.Projected, projections.box("low", "high"), {"low": -0.5, "high": np.linspace(0.2, 0.9, 8)}),
    "simplex": (bl.Projected, projections.simplex("radius"), {"radius": 2.0}),
    "l2 ball": (bl.Projected, projections.l2_ball("radius"), {"radius": 1.5}),
}


@pytest.fixture(params=CASES)
def solved(request):
    """A case, its hyperparameters, and F as a function of them."""
    case = Case(*CASES[request.param])
    h, data, args = moved(bl.get_backend("torch"), (case.hparams, case.data["inner_args"], case.data["outer_args"]))

    @bilevel_torch.implicit_minimizer(Quadratic(), TIGHT, prox=case.operator)
    def solve(h, A, b):
        fit = bl.proximal_fit(case.problem, inner_args=(A, b), gtol=1e-13)
        return fit(h, torch.zeros_like(b))

    return case, h, lambda h: Distance()(solve(h, *data), h, *args)


def test_both_modes_match_the_slopes_of_the_solved_problem(solved):
    case, h, value = solved
    for grad in (torch.func.grad, torch.func.jacfwd):
        found = grad(value)(h)
        for key, slope in case.slopes.items():
            assert relative_error(found[key], slope) <= 1e-6


def test_second_derivatives_are_differences_of_the_first(solved, request):
    if "nuclear" in request.node.callspec.id:
        pytest.skip("its second derivatives are zero, as its page says")
    _, h, value = solved
    key = max(h)  # a penalty, a bound, a radius, or the shift
    along = {name: torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) for name, x in h.items()}

    def slope(h):
        return torch.func.grad(value)(h)[key].sum()

    found = sum((torch.func.grad(slope)(h)[name] * along[name]).sum() for name in h)
    high, low = (slope({name: x + step * along[name] for name, x in h.items()}) for step in (1e-5, -1e-5))
    assert relative_error(found, (high - low) / 2e-5) <= 1e-6


def test_the_derivative_by_data():
    case = Case(*CASES["elastic net"])
    h, data = moved(bl.get_backend("torch"), (case.hparams, case.data["inner_args"]))

    def train(h, A, b):
        return bl.proximal_fit(case.problem, inner_args=(A, b), gtol=1e-13)(h, torch.zeros_like(b))

    solve = bilevel_torch.implicit_minimizer(Quadratic(), TIGHT, prox=case.operator)(train)
    assert torch.autograd.gradcheck(lambda b: solve(h, data[0], b).sin().sum(), data[1].requires_grad_(), eps=1e-5)


def test_a_kink_is_a_warning():
    soft = prox.l1("penalty")
    h = {"b": torch.tensor([1.0, 3.0]).double().requires_grad_(), "penalty": torch.zeros(()).double()}
    solve = bilevel_torch.implicit_minimizer(lambda w, h: 0.5 * ((w - h["b"]) ** 2).sum(), prox=soft)(
        lambda h: soft(h["b"], h)
    )
    with pytest.warns(bl.InnerProblemWarning, match="at a kink of the proximal step"):
        solve(h).sum().backward()


class TestErrors:
    def test_a_problem_in_place_of_its_parts(self):
        problem = Case(*CASES["box"]).problem
        with pytest.raises(TypeError, match=r"implicit_minimizer\(problem.smooth, prox=lambda v, hparams, _: problem"):
            bilevel_torch.implicit_minimizer(problem)

    def test_a_number_in_place_of_an_operator(self):
        with pytest.raises(TypeError, match=r"expected prox, a function of \(v, hparams, step_size\).*got a float"):
            bilevel_torch.implicit_minimizer(Quadratic(), prox=0.1)

    def test_an_operator_with_a_result_of_another_shape(self):
        solve = bilevel_torch.implicit_minimizer(
            lambda w, h: ((w - h) ** 2).sum(), prox=lambda v, h, step_size: v.sum()
        )(torch.clone)
        with pytest.raises(ValueError, match="prox: expected the structure of params"):
            solve(torch.ones(2, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("curvature", [1e-6, 1e6])
def test_a_step_size_that_fits_the_curvature_keeps_the_digits_of_float32(curvature):
    operator, h = prox.group_lasso([0, 0, 0], curvature), torch.tensor([2.0, -1.0, 3.0])

    def gradient(h, **options):
        h = h.clone().requires_grad_()
        loss = lambda w, h: 0.5 * curvature * ((w - h) ** 2).sum()  # noqa: E731
        solve = bilevel_torch.implicit_minimizer(loss, prox=operator, on_failure="ignore", **options)
        (solve(lambda h: h - h / h.norm())(h) * torch.arange(3)).sum().backward()
        return h.grad

    expected = gradient(h.double(), step_size=1 / curvature)
    assert relative_error(gradient(h, step_size=1 / curvature), expected) <= 1e-6
    assert relative_error(gradient(h), expected) > 1e-4
