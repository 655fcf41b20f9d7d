"""`bilevel_torch.diagnose` checks the losses of a loop as they are, and leaves everything as it was."""

from contextlib import contextmanager

import pytest

import bilevel as bl

torch = pytest.importorskip("torch")
from torch_losses import Twice  # noqa: E402

import bilevel_torch  # noqa: E402

nn, F = torch.nn, torch.nn.functional


class Loop:
    """A network, a weight per example, and its two losses as functions without arguments."""

    def __init__(self, *between, dtype=torch.float32):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), *between, nn.Tanh(), nn.Linear(3, 1)).to(dtype)
        self.x, self.y = torch.randn(12, 4, dtype=dtype), torch.randn(12, 1, dtype=dtype)
        self.weights = torch.zeros(12, dtype=dtype, requires_grad=True)
        self.penalty = 0.1

    def inner(self):
        losses = (self.net(self.x) - self.y).square()[:, 0]
        return (self.weights.exp() * losses).mean() + self.penalty * sum((p**2).sum() for p in self.net.parameters())

    def outer(self):
        return F.mse_loss(self.net(self.x + 1), self.y)

    def diagnose(self, params=None, **options):
        params = self.net.named_parameters() if params is None else params
        return bilevel_torch.diagnose(self.inner, self.outer, params, self.weights, **options)


@contextmanager
def untouched(*tensors):
    """Assert that tensors keep their memory, values, version, .grad, dtype and gradient accumulator."""
    for t in tensors:
        if t.is_leaf and t.requires_grad:
            t.grad = torch.ones_like(t)
    accumulators = [t.expand_as(t).grad_fn.next_functions[0][0] if t.requires_grad else None for t in tensors]
    before = [(t.data_ptr(), t._version, t.dtype, t.requires_grad, t.detach().clone()) for t in tensors]
    state = torch.get_rng_state()
    yield
    for t, accumulator, (*facts, values) in zip(tensors, accumulators, before, strict=True):
        assert [t.data_ptr(), t._version, t.dtype, t.requires_grad] == facts
        assert torch.equal(t, values)
        if accumulator is not None:  # DDP's hooks are on it
            assert t.expand_as(t).grad_fn.next_functions[0][0] is accumulator
            assert torch.equal(t.grad, torch.ones_like(t))
    assert torch.equal(torch.get_rng_state(), state)


def blamed(report):
    return {a.name for a in report.derivatives.of if a.wrong}


def names(report):
    return [finding.name for finding in report.findings]


@pytest.mark.parametrize("between", [(), (nn.BatchNorm1d(3),), (nn.Dropout(0.3),)], ids=["plain", "norm", "dropout"])
def test_a_right_loop_is_verified_and_left_as_it_was(between):
    loop = Loop(*between)
    with untouched(*loop.net.parameters(), *loop.net.buffers(), loop.weights, loop.x):
        report = loop.diagnose(solver=bl.CG(damping=1.0))
    assert report.verified
    assert report.derivatives.eps < 1e-15  # in float64, though all is float32
    assert not {"wrong derivative", "other arrays", "no influence", "no curvature", "kink"} & {*names(report)}


def test_the_numbers_are_those_of_the_problem_with_arguments():
    loop = Loop(dtype=torch.float64)

    def call(p, x):
        return torch.func.functional_call(loop.net, p, (x,))

    def inner(p, h):
        losses = (call(p, loop.x) - loop.y).square()[:, 0]
        return (h.exp() * losses).mean() + loop.penalty * sum((w**2).sum() for w in p.values())

    problem = bl.Problem(inner, lambda p, h: F.mse_loss(call(p, loop.x + 1), loop.y))
    expected = bl.diagnose(problem, dict(loop.net.named_parameters()), loop.weights, solver=bl.CG(damping=1.0))
    report = loop.diagnose(solver=bl.CG(damping=1.0))
    assert type(report) is type(expected)
    for number in ("value", "grad_norm", "distance", "residual", "change"):
        assert getattr(report, number) == pytest.approx(getattr(expected, number), rel=1e-9), number
    assert report.eigenvalues.largest == pytest.approx(expected.eigenvalues.largest, rel=1e-9)
    assert names(report) == names(expected)


@pytest.mark.parametrize("which", ["params", "hparams"])
def test_a_wrong_derivative_is_found_in_either_argument(which):
    loop = Loop()
    inner = loop.inner

    def wrong():
        scale = Twice.apply(loop.weights) if which == "hparams" else loop.weights
        gain = Twice.apply(loop.net[0].bias).sum() ** 2 if which == "params" else 0.0
        return inner() + (scale.exp() * loop.net(loop.x).square()[:, 0]).mean() + gain

    loop.inner = wrong
    with untouched(*loop.net.parameters(), loop.weights):
        report = loop.diagnose(solver=bl.CG(damping=1.0))
    assert blamed(report) == ({"inner cross_vjp"} if which == "hparams" else {"inner grad", "inner hvp"})
    if which == "params":
        assert report.derivatives.of[1].leaf == "params['0.bias']"


def test_dropout_is_found():
    assert names(Loop(nn.Dropout(0.5)).diagnose(solver=bl.CG(damping=1.0)))[0] == "not repeatable"


def test_a_hyperparameter_that_the_losses_do_not_use_is_found():
    loop = Loop()
    unused = torch.ones(2, requires_grad=True)
    report = bilevel_torch.diagnose(
        loop.inner,
        loop.outer,
        loop.net.parameters(),
        {"used": loop.weights, "unused": unused},
        solver=bl.CG(damping=1.0),
    )
    assert "Neither F nor ∂L/∂w depends on hparams['unused']" in report.findings[0].what


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_at_any_evaluation_leaves_everything_as_it_was(error):
    loop, calls = Loop(nn.BatchNorm1d(3)), []
    inner = loop.inner

    def failing():
        calls.append(1)
        if len(calls) == fails:
            raise error
        return inner()

    loop.inner = failing
    for fails in range(1, 12):
        calls.clear()
        with untouched(*loop.net.parameters(), *loop.net.buffers(), loop.weights):
            try:
                loop.diagnose(solver=bl.CG(damping=1.0))
            except error:
                continue
        assert fails > 3  # the first three evaluations are at the given values: their errors are the caller's


def test_a_weak_reference_to_a_weight_is_no_obstacle():
    """Compilers keep weak references to contents. Then modules hold copies."""
    loop = Loop()
    kept = torch._C._WeakTensorRef(loop.net[0].weight)
    with untouched(*loop.net.parameters(), loop.weights):
        report = loop.diagnose([loop.net[0].weight], solver=bl.CG(damping=1.0))
    assert not kept.expired()
    assert not blamed(report)


class TestArguments:
    def test_frozen_weights_are_left_out(self):
        loop = Loop()
        loop.net[0].weight.requires_grad_(False)
        for params in (loop.net.parameters(), dict(loop.net.named_parameters())):
            report = loop.diagnose(params, solver=bl.CG(damping=1.0))
            assert report.params_size == 3 + 3 + 1
            assert report.verified

    @pytest.mark.parametrize("loss", [lambda net: net, lambda x, y: x], ids=["one", "two"])
    def test_losses_with_arguments_are_refused(self, loss):
        w, h = (torch.ones(1, requires_grad=True) for _ in range(2))
        with pytest.raises(
            TypeError, match=r"outer_loss: expected a function without arguments, .* missing a required"
        ):
            bilevel_torch.diagnose(lambda: ((w - h) ** 2).sum(), loss, w, h)

    def test_losses_that_take_the_next_batch_are_refused(self):
        w, h = (torch.ones(1, requires_grad=True) for _ in range(2))
        batches = iter([torch.ones(1), torch.ones(1)])
        with pytest.raises(RuntimeError, match=r"StopIteration\. .* Take the batch from the iterator outside"):
            bilevel_torch.diagnose(lambda: ((w - h * next(batches)) ** 2).sum(), lambda: (w**2).sum(), w, h)

    def test_losses_that_are_already_computed_are_refused(self):
        loop = Loop()
        with pytest.raises(TypeError, match=r"inner_loss: expected a function without arguments .* got Tensor"):
            bilevel_torch.diagnose(loop.inner(), loop.outer, loop.net.parameters(), loop.weights)

    def test_computed_hyperparameters_are_refused(self):
        loop = Loop()
        with pytest.raises(ValueError, match="hparams is computed from other tensors"):
            bilevel_torch.diagnose(loop.inner, loop.outer, loop.net.parameters(), loop.weights.exp())

    def test_hyperparameters_without_gradients_are_refused(self):
        loop = Loop()
        with pytest.raises(ValueError, match=r"hparams\[0\] does not require a gradient"):
            bilevel_torch.diagnose(loop.inner, loop.outer, loop.net.parameters(), [torch.ones(2)])

    def test_weights_without_gradients_are_refused(self):
        loop = Loop()
        with pytest.raises(ValueError, match=r"params\['0.*'\] does not require a gradient"):
            loop.diagnose(loop.net.state_dict())
