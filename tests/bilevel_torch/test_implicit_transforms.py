"""`bilevel_torch.implicit_minimizer` under torch.func, forward mode and vectorized Jacobians, against closed forms."""

import gc
import weakref

import pytest
from frameworks import relative_error

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
# PyTorch's forward mode compiles its own rules when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

generator = torch.Generator().manual_seed(0)
X, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((30, 4), (30,)))
H = torch.linspace(-2, 0, 12, dtype=torch.float64).reshape(3, 4)
SOLVER = bl.CG(rtol=1e-12)


def inner(w, h, X):
    return ((X @ w - y) ** 2).mean() / 2 + (h.exp() * w**2).sum() / 2


def minimum(h, X=X):
    return torch.linalg.solve(X.T @ X / len(y) + torch.diag(h.exp()), X.T @ y / len(y))


@bilevel_torch.implicit_minimizer(inner, solver=SOLVER)
def solve(h, X=X):
    """A training that records its own steps and reads values, as trainings do."""
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, tolerance_grad=1e-13, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = inner(w, h, X)
        loss.backward()
        assert loss.item() > 0
        return loss

    optimizer.step(closure)
    return w


def jacobian(function, *args):
    return torch.autograd.functional.jacobian(function, args)


def close(found, expected):
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= 1e-8


def test_jacobians_in_reverse_and_forward_mode():
    expected = jacobian(minimum, H[0])[0]
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        close(transform(solve)(H[0]), expected)
    close(torch.func.jacfwd(lambda X: solve(H[0], X))(X), jacobian(minimum, H[0], X)[1])
    assert torch.autograd.gradcheck(solve, (H[0].clone().requires_grad_(),), check_forward_ad=True, atol=1e-6)


def test_a_derivative_along_a_direction():
    value, change = torch.func.jvp(solve, (H[0],), (H[1],))
    close(value, minimum(H[0]))
    close(change, jacobian(minimum, H[0])[0] @ H[1])


def test_gradients_and_batches_in_any_order():
    def loss(solve):
        return lambda h, X: (solve(h, X) ** 3).sum()

    data = torch.stack([X, 2 * X, X.flip(0)])
    expected = torch.stack([torch.func.grad(loss(minimum))(h, A) for h, A in zip(H, data, strict=True)])
    close(torch.func.vmap(torch.func.grad(loss(solve)))(H, data), expected)
    close(torch.func.grad(lambda h: torch.func.vmap(loss(solve))(h, data).sum())(H), expected)
    h = H.clone().requires_grad_()
    torch.func.vmap(loss(solve), in_dims=(0, None))(h, X).sum().backward()
    close(h.grad, torch.stack([torch.func.grad(loss(minimum))(h, X) for h in H]))
    outer_product = torch.func.vmap(torch.func.vmap(solve, in_dims=(0, None)), in_dims=(None, 0))
    close(outer_product(H, data), torch.stack([torch.stack([minimum(h, A) for h in H]) for A in data]))


def test_trees_and_auxiliary_results():
    @bilevel_torch.implicit_minimizer(lambda w, h: ((w["a"] - h["a"] ** 2) ** 2).sum(), has_aux=True)
    def train(h):
        return {"a": h["a"] ** 2}, {"first": h["a"][0] * 1}

    jac, aux = torch.func.jacrev(train, has_aux=True)({"a": H[0]})
    close(jac["a"]["a"], torch.diag(2 * H[0]))
    assert aux == {"first": H[0, 0]}
    logs = []

    def batched(h):
        w, aux = train({"a": h})
        logs.append(aux)
        return w["a"]

    close(torch.func.vmap(batched)(H), H**2)
    assert [[each["first"] for each in log] for log in logs] == [list(H[:, 0])]


@pytest.mark.parametrize("solver", ["cg", "neumann", "exact"])
@pytest.mark.parametrize(
    "call",
    [
        lambda solve, h: torch.autograd.functional.jacobian(solve, h, vectorize=True),
        lambda solve, h: torch.autograd.functional.jacobian(solve, h, vectorize=True, strategy="forward-mode"),
        lambda solve, h: torch.autograd.grad(solve(h), h, torch.eye(4), is_grads_batched=True),
    ],
    ids=["jacobian", "forward mode", "is_grads_batched"],
)
def test_the_older_vectorization_names_the_newer(call, solver):
    solve = bilevel_torch.implicit_minimizer(lambda w, h: ((w - h) ** 2).sum(), solver=solver)(lambda h: h.clone())
    h = torch.ones(4, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"vectorize=True, is_grads_batched=True\)\. Call torch\.func\.jacrev\(solve"
    ):
        call(solve, h)
    torch.testing.assert_close(torch.func.jacrev(solve)(h), torch.eye(4))


@pytest.mark.parametrize("orders", [("jacrev", "jacfwd"), ("jacfwd", "jacrev"), ("jacfwd", "jacfwd")])
def test_second_derivatives_with_forward_mode_raise(orders):
    first, second = (getattr(torch.func, name) for name in orders)
    with pytest.raises(RuntimeError, match=r"has (second|two) derivatives in reverse mode"):
        second(first(solve))(H[0])


@pytest.mark.parametrize("argument", [0, 1])
def test_second_derivatives_in_reverse_mode_are_those_of_the_closed_form(argument):
    def value(minimizer):
        return lambda *args: (minimizer(*args) ** 3).sum()

    data = (H[0], X)
    expected = torch.autograd.functional.hessian(value(minimum), data)[argument][argument]
    for second in (
        torch.func.jacrev(torch.func.grad(value(solve), argument), argument)(*data),
        torch.autograd.functional.hessian(value(solve), data)[argument][argument],
    ):
        close(second, expected)


def test_without_influence_forward_mode_raises_too():
    lost = bilevel_torch.implicit_minimizer(lambda w, h: (w**2).sum())(lambda h: h * 0)
    with pytest.raises(ValueError, match="∂L/∂w does not depend on hparams"):
        torch.func.jvp(lost, (H[0],), (H[1],))
    with pytest.raises(ValueError, match="Neither F nor ∂L/∂w depends on hparams"):
        torch.func.grad(lambda h: lost(h).sum())(H[0])


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd])
@pytest.mark.parametrize("form", ["functions", "losses"])
def test_a_hypergradient_inside_of_a_transform_names_what_works(transform, form):
    w = torch.ones(4, requires_grad=True)
    problem = bl.Problem(lambda w, h: ((w - h) ** 2).sum(), lambda w, h: (w**2).sum())

    def call(h):
        if form == "functions":
            return bl.hypergradient(problem, w.detach(), h).grad.sum()
        return bilevel_torch.hypergradient(problem.inner(w, h), problem.outer(w, h), w, h).grad.sum()

    with pytest.raises(
        RuntimeError, match=r"^A hypergradient cannot be computed inside of a transform.*Loop over.*imp"
    ):
        transform(call)(H)


def test_a_result_is_freed_with_its_last_reference():
    h = H[0].clone().requires_grad_()
    gc.disable()  # a cycle of references would keep it until the next collection
    try:
        for backward in (False, True):
            w = solve(h)
            kept = weakref.ref(w)
            if backward:
                w.sum().backward()
            del w
            assert kept() is None
    finally:
        gc.enable()
