"""`implicit_root` and `implicit_fixed_point`: against closed forms, in backward passes and under torch.func."""

import pytest

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")

A = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.5], [0.0, 0.3, 4.0]], dtype=torch.float64)  # not symmetric
# PyTorch's forward mode compiles its own rules when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

TIGHT = bl.GMRES(rtol=1e-13)
H, X = torch.tensor([0.3, -0.2, 0.5]).double(), torch.tensor([1.0, -0.5, 2.0]).double()


def solution(h, x=X):
    """The root of A w + h·w = x², in closed form, which autograd differentiates by itself."""
    return {"w": torch.linalg.solve(A.to(h) + torch.diag(h), x**2)}


def residual(w, h, x):
    return {"w": A.to(h) @ w["w"] + h * w["w"] - x**2}


def step(w, h, x):
    return {"w": w["w"] - 0.2 * residual(w, h, x)["w"]}


def outer(w):
    return w["w"].sin().sum() + w["w"][0] * w["w"][1]


ROOT = bilevel_torch.implicit_root(residual, TIGHT)(solution)
FIXED_POINT = bilevel_torch.implicit_fixed_point(step, TIGHT)(solution)
SOLVES = pytest.mark.parametrize("solve", [ROOT, FIXED_POINT], ids=["root", "fixed point"])


def close(found, expected, rtol=1e-10):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@SOLVES
def test_the_backward_pass_matches_the_closed_form(solve):
    args = H.clone().requires_grad_(), X.clone().requires_grad_()
    ours, exact = (torch.autograd.grad(outer(f(*args)), args) for f in (solve, solution))
    close(ours, exact)


def test_a_complex_unknown_as_a_pair():
    def square(z, a):  # (x + iy)² = a
        value = torch.complex(z["x"], z["y"]) ** 2 - a
        return {"x": value.real, "y": value.imag}

    def root(a):
        found = torch.sqrt(a)
        return {"x": found.real, "y": found.imag}

    a = torch.tensor([-3.0 + 4.0j, 1.0 - 2.0j], dtype=torch.complex128)
    pair = {"re": a.real.clone().requires_grad_(), "im": a.imag.clone().requires_grad_()}
    solve = bilevel_torch.implicit_root(lambda z, h: square(z, torch.complex(h["re"], h["im"])), TIGHT)(
        lambda h: root(torch.complex(h["re"], h["im"]))
    )
    z = solve(pair)
    by_re, by_im = torch.autograd.grad((z["x"] - 2 * z["y"]).sum(), (pair["re"], pair["im"]))
    slope = 1 / (2 * torch.sqrt(a))  # dz/da, so dx - 2 dy = Re((1 + 2i) slope da)
    close(by_re, ((1 + 2j) * slope).real)
    close(by_im, ((1 + 2j) * slope * 1j).real)


@SOLVES
def test_gradcheck_in_both_modes(solve):
    args = H.clone().requires_grad_(), X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, x: solve(h, x)["w"], args, check_forward_ad=True)


@SOLVES
def test_second_derivatives_match_the_closed_form(solve):
    args = H.clone().requires_grad_(), X.clone().requires_grad_()
    ours, exact = (torch.autograd.functional.hessian(lambda h, x, f=f: outer(f(h, x)), args) for f in (solve, solution))
    for row, expected in zip(ours, exact, strict=True):
        close(row, expected, rtol=1e-8)


@SOLVES
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(f),
        lambda f: torch.func.jacrev(f),
        lambda f: torch.func.jacfwd(f),
        lambda f: lambda h: torch.func.vmap(torch.func.grad(f))(torch.stack([h, h + 1])),
        lambda f: lambda h: torch.func.jvp(f, (h,), (torch.ones(3).double(),)),
    ],
    ids=["grad", "jacrev", "jacfwd", "vmap", "jvp"],
)
def test_transforms_match_the_closed_form(solve, transform):
    ours, exact = (transform(lambda h, f=f: outer(f(h)))(H) for f in (solve, solution))
    close(ours, exact)


@pytest.mark.parametrize("name", ["implicit_root", "implicit_fixed_point"])
def test_float32(name):
    function = residual if name == "implicit_root" else step
    h = H.float().requires_grad_()
    outer(getattr(bilevel_torch, name)(function)(solution)(h, X.float())).backward()
    assert h.grad.dtype == torch.float32
    close(h.grad.double(), torch.func.grad(lambda h: outer(solution(h)))(H), 1e-4)


def test_keywords_and_an_auxiliary_result():
    @bilevel_torch.implicit_root(residual, TIGHT, has_aux=True)
    def solve(h, *, x, steps=3):
        return solution(h, x), {"steps": steps, "squares": x**2}

    h, x = H.clone().requires_grad_(), X.clone().requires_grad_()
    w, aux = solve(h, x=x)
    assert aux["steps"] == 3
    assert not aux["squares"].requires_grad
    found = torch.autograd.grad(outer(w), (h, x))
    close(found, torch.autograd.grad(outer(solution(h, x)), (h, x)))


def test_an_equilibrium_of_a_module():
    """A layer whose weights have a derivative, and whose states are the unknowns."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4).double()
    with torch.no_grad():
        layer.weight.mul_(0.5)
    weights = dict(layer.named_parameters())
    inputs = torch.randn(3, 4).double()

    def cell(z, weights, x):
        return torch.tanh(torch.func.functional_call(layer, weights, (z,)) + x)

    def iterate(weights, x):
        z = torch.zeros_like(x)
        for _ in range(200):
            z = cell(z, weights, x)
        return z

    solve = bilevel_torch.implicit_fixed_point(cell, bl.Neumann(terms=200, step_size=1.0))(iterate)
    found = torch.autograd.grad(solve(weights, inputs).square().sum(), [*weights.values()])
    close(found, torch.autograd.grad(iterate(weights, inputs).square().sum(), [*weights.values()]), 1e-8)


class TestErrors:
    def backward(self, decorate, function, **options):
        solve = getattr(bilevel_torch, decorate)(function, **options)(solution)
        outer(solve(H.clone().requires_grad_(), X)).backward()

    def test_a_solver_that_relies_on_symmetry(self):
        with pytest.raises(TypeError, match=r"CG relies on a symmetric operator.*gmres"):
            self.backward("implicit_root", residual, solver="cg")

    @pytest.mark.parametrize(
        ("decorate", "function", "text"),
        [
            ("implicit_root", lambda w, h, x: w["w"], r"residual\['w'\]: expected the structure of params"),
            ("implicit_root", lambda w, h, x: w, r"depends on .*hparams"),
            ("implicit_fixed_point", lambda w, h, x: {"w": 1 * h}, "step does not depend on params"),
        ],
    )
    def test_a_function_that_defines_nothing(self, decorate, function, text):
        with pytest.raises(ValueError, match=text):
            self.backward(decorate, function)

    def test_forward_mode_without_influence(self):
        solve = bilevel_torch.implicit_root(lambda w, h, x: w)(solution)
        with pytest.raises(ValueError, match="residual does not depend on hparams"):
            torch.func.jacfwd(lambda h: solve(h, X)["w"])(H)

    def test_a_failed_solve_is_reported(self):
        with pytest.warns(bl.SolverWarning, match="Raise restart or max_restarts"):
            self.backward("implicit_root", residual, solver=bl.GMRES(restart=1, max_restarts=1, rtol=1e-12))

    def test_higher_derivatives_name_the_decorator(self):
        with pytest.raises(RuntimeError, match="implicit_root has second derivatives in reverse mode only"):
            torch.func.hessian(lambda h: outer(ROOT(h)))(H)
