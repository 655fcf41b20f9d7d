"""`bilevel_torch.FirstOrder`: hypergradients by gradients only, in a training loop."""

import copy
import io
import weakref
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest

import bilevel as bl

pytest.importorskip("torch")

import torch
from first_order_cases import SGD, regression
from torch import nn
from torch.nn import functional as F

import bilevel_torch


class Quadratic(nn.Module):
    """L = ½ wᵀHw − λ·w, so w* = H⁻¹λ."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.curvatures = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=dtype)

    def forward(self, hparams):
        return 0.5 * (self.curvatures * self.weight**2).sum() - (hparams * self.weight).sum()


@pytest.fixture
def quadratic():
    net, hparams = Quadratic(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        net.weight.copy_(hparams / net.curvatures)
    return net, hparams, lambda: net(hparams), lambda: ((net.weight - 3) ** 2).sum() / 2


def relative(a, b):
    return float((a - b).norm() / b.norm())


def by_cg(net, hparams, inner, outer):
    return bilevel_torch.hypergradient(inner(), outer(), net.parameters(), hparams, solver=bl.CG(rtol=1e-10)).grad


def test_tracked_v_converges_linearly_to_the_solution(quadratic):
    """The error of v contracts by max |1 − lr · curvature| = 0.75 in each step, and the residual is measured."""
    net, hparams, inner, outer = quadratic
    method = bilevel_torch.FirstOrder(net, hparams, optimizer=SGD)
    exact = (net.weight.detach() - 3) / net.curvatures
    results = [method.backward(inner, outer, accumulate=False) for _ in range(40)]
    errors = [relative(hg.grad, exact) for hg in results]
    rates = np.array(errors[11:26]) / np.array(errors[10:25])
    np.testing.assert_allclose(rates, 0.75, rtol=1e-3)
    hg = results[-1]
    assert hg.info.status == bl.Status.CONVERGED
    assert hg.info.residual_norm < 1e-4 * hg.info.rhs_norm
    assert torch.equal(hg.value, outer().detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_network_agrees_with_cg(dtype):
    net, weights, inner, outer = regression(dtype)
    exact = by_cg(*regression(torch.float64)).to(dtype)
    method = bilevel_torch.FirstOrder(net, weights, optimizer=SGD, steps=400)
    hg = method.backward(inner, outer)
    assert relative(hg.grad, exact) < (1e-6 if dtype == torch.float64 else 1e-3)
    assert torch.equal(weights.grad, hg.grad)
    assert weights.grad.dtype == dtype


def test_error_of_the_differences_is_of_second_order():
    net, weights, inner, outer = regression()
    exact = by_cg(net, weights, inner, outer)
    errors = []
    for radius in (0.1, 0.05, 0.025):
        method = bilevel_torch.FirstOrder(net, weights, optimizer=SGD, steps=400, perturbation=radius)
        errors.append(relative(method.backward(inner, outer).grad, exact))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 2, atol=0.3)


class Attention(nn.Module):
    """Attention with a residual, whose fused kernels have no second derivative."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + y.transpose(1, 2).reshape(2, 6, 8))


def attention_losses(net):
    """Return weights of examples, and the two losses of a module that runs attention."""
    x, x_val = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(2, requires_grad=True)

    def inner():
        return (weights.exp() * ((net(x) - 1) ** 2).mean((1, 2))).mean()

    return weights, inner, lambda: ((net(x_val) - 1) ** 2).mean()


def flash():
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)


def by_identity(net, weights, inner, outer):
    """Return (∂²L/∂λ∂w)ᵀ ∂F/∂w by second derivatives."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return bilevel_torch.hypergradient(inner(), outer(), net.parameters(), weights, solver="identity").grad


def test_flash_attention_under_compile():
    """CG fails in both cases. The compiled module is compiled once, and the gradients are right."""
    net = Attention()
    exact = by_identity(net, *attention_losses(net))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for run, message in ((net, "flash_attention"), (compiled, "a compiled module differentiates only once")):
        weights, inner, outer = attention_losses(run)
        with flash():
            with pytest.raises(RuntimeError, match=message):
                bilevel_torch.backward(inner(), outer(), net.parameters(), weights)
            method = bilevel_torch.FirstOrder(net, weights)
            hg = method.backward(inner, outer)
        np.testing.assert_allclose(hg.grad / method.state_dict()["multiple"], exact, rtol=2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bfloat16_autocast_chooses_a_larger_perturbation():
    net = Attention()
    exact = by_identity(net, *attention_losses(net))
    weights, inner, outer = attention_losses(lambda x: run(x).float())

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    method = bilevel_torch.FirstOrder(net, weights)
    grad = method.backward(inner, outer).grad / method.state_dict()["multiple"]
    assert method.state_dict()["eps"] == torch.finfo(torch.bfloat16).eps
    assert relative(grad, exact) < 0.15


def test_bfloat16_parameters():
    net = Attention()
    exact = by_identity(net, *attention_losses(net))
    net.bfloat16()
    weights, inner, outer = attention_losses(lambda x: net(x.bfloat16()).float())
    method = bilevel_torch.FirstOrder(net, weights, optimizer=SGD)
    assert {v.dtype for v in method.backward(inner, outer).adjoint} == {torch.float32}
    grad = bilevel_torch.FirstOrder(net, weights)
    assert relative(grad.backward(inner, outer).grad / grad.state_dict()["multiple"], exact) < 0.15


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant):
    from torch.utils.checkpoint import checkpoint

    net = Attention()
    expected = bilevel_torch.FirstOrder(net, (losses := attention_losses(net))[0], optimizer=SGD).backward(*losses[1:])
    weights, inner, outer = attention_losses(lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=reentrant))
    hg = bilevel_torch.FirstOrder(net, weights, optimizer=SGD).backward(inner, outer)
    assert torch.equal(hg.grad, expected.grad)


@pytest.mark.parametrize("optimizer", [None, SGD])
def test_everything_else_stays_as_it_was(optimizer):
    """Weights, buffers and gradients keep their bits. Dropout draws the same mask on both sides of a difference."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 1))
    x, weights = torch.randn(8, 3), torch.zeros(8, requires_grad=True)

    def inner():
        return (weights.exp() * net(x)[:, 0] ** 2).mean()

    inner().backward()
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]
    weights.grad = torch.ones(8)
    method = bilevel_torch.FirstOrder(net, weights, optimizer=optimizer)
    random_state = torch.get_rng_state()
    hg = method.backward(inner, lambda: net(x).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert torch.equal(weights.grad, 1 + hg.grad)
    assert not torch.equal(random_state, torch.get_rng_state())
    method.backward(inner, lambda: net(x).square().mean(), accumulate=False)
    assert weights.grad.abs().max() < 10  # different masks would give rounding times 1 / perturbation


def test_micro_batches_are_a_mean():
    net, weights, inner, outer = regression()

    def other():
        return (weights.sum() * net[0].weight.square()).sum() + inner()

    def call(*losses):
        return bilevel_torch.FirstOrder(net, weights, optimizer=SGD).backward(*losses).grad

    grad = call([inner, other], [outer, lambda: 3 * outer()])
    torch.testing.assert_close(grad, call(lambda: (inner() + other()) / 2, lambda: 2 * outer()), rtol=1e-6, atol=0)


class Watched(torch.autograd.Function):
    """The function tanh. The class knows which of its graphs are alive."""

    graphs: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.tanh())
        ctx.token = nn.Identity()  # lives as long as the graph
        Watched.graphs.add(ctx.token)
        return y

    @staticmethod
    def backward(ctx, *grads):
        (y,) = ctx.saved_tensors
        return grads[0] * (1 - y**2)


@pytest.mark.parametrize("optimizer", [None, SGD])
def test_one_graph_is_alive_at_a_time(optimizer):
    """Two graphs would take twice the memory of a training step."""
    activation = type("Activation", (nn.Module,), {"forward": lambda self, x: Watched.apply(x)})
    net, weights, inner, outer = regression(activation=activation)
    before = []

    def watched(loss):
        before.append(len(Watched.graphs))
        return loss()

    method = bilevel_torch.FirstOrder(net, weights, optimizer=optimizer)
    for _ in range(2):
        method.backward(2 * [lambda: watched(inner)], 2 * [lambda: watched(outer)])
    assert set(before) == {0}
    assert not Watched.graphs


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_are_counted(steps):
    """A call takes one gradient of F, and two of L for each step."""
    net, weights, inner, outer = regression()
    calls = []
    method = bilevel_torch.FirstOrder(net, weights, optimizer=SGD, steps=steps)
    method.backward(inner, outer)
    method.backward(lambda: calls.append("inner") or inner(), lambda: calls.append("outer") or outer())
    assert calls == ["outer"] + 2 * steps * ["inner"]


@pytest.mark.parametrize(
    ("optimizer", "preconditioned"),
    [(None, False), (None, True), (partial(torch.optim.SGD, lr=1e-3, momentum=0.9), False)],
)
def test_resumes_to_the_same_bits(optimizer, preconditioned):
    def start():
        net, weights, inner, outer = regression()
        adam = torch.optim.Adam([*net.parameters()], 1e-2, eps=0.1)
        options = {"optimizer": optimizer, "preconditioner": adam if preconditioned else None}
        return net, weights, inner, outer, adam, bilevel_torch.FirstOrder(net, weights, **options)

    def run(net, weights, inner, outer, adam, method, steps=3):
        for _ in range(steps):
            adam.zero_grad()
            inner().backward()
            adam.step()
            method.backward(inner, outer, accumulate=False)
            with torch.no_grad():
                weights -= weights.grad
        return weights.detach().clone()

    straight = start()
    run(*straight)
    saved = io.BytesIO()
    torch.save([x.state_dict() for x in (straight[0], straight[4], straight[5])] + [straight[1]], saved)
    expected = run(*straight)
    resumed = start()
    saved.seek(0)
    *states, weights = torch.load(saved)
    for x, state in zip((resumed[0], resumed[4], resumed[5]), states, strict=True):
        x.load_state_dict(state)
    with torch.no_grad():
        resumed[1].copy_(weights)
    assert torch.equal(run(*resumed), expected)


def test_preconditioner_is_the_diagonal_of_adam():
    """v is a multiple of ∂F/∂w / (√v̂ + eps + rms(√v̂)/10). After one step of Adam, √v̂ is the absolute gradient."""
    net, weights, inner, outer = regression()
    adam = torch.optim.Adam(net.parameters(), 1e-2, eps=1e-3)
    adam.zero_grad()
    loss = inner() + outer()
    loss.backward()
    rms = torch.cat([p.grad.ravel() for p in net.parameters()]).square().mean().sqrt()
    roots = [p.grad.abs() + 1e-3 + 0.1 * rms for p in net.parameters()]
    adam.step()
    method = bilevel_torch.FirstOrder(net, weights, preconditioner=adam)
    hg = method.backward(inner, outer)
    c = torch.autograd.grad(outer(), list(net.parameters()))
    multiple = method.state_dict()["multiple"]
    for v, g, root in zip(hg.adjoint, c, roots, strict=True):
        torch.testing.assert_close(v, multiple * g / root, rtol=1e-6, atol=1e-12)
    # The multiple makes the residual H v − c smallest: it is orthogonal to H v.
    grads = torch.autograd.grad(inner(), list(net.parameters()), create_graph=True)
    products = torch.autograd.grad(grads, list(net.parameters()), hg.adjoint)
    square = float(sum((x * x).sum() for x in products))
    inner_product = float(sum((x * (x - y)).sum() for x, y in zip(products, c, strict=True)))
    assert inner_product == pytest.approx(0, abs=1e-6 * square)


def test_hparams_in_the_outer_loss_only():
    net, _, _, outer = regression()
    h = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    hg = bilevel_torch.FirstOrder(net, h).backward(lambda: outer(), lambda: outer() + h**2)
    assert float(h.grad) == 4.0 == float(hg.grad)


def test_frozen_parameters_and_a_network_of_hparams():
    """Frozen parameters have no entries in v. Hparams may be parameters of the module."""
    net, _, _, outer = regression()
    scale = nn.Linear(1, 1, dtype=torch.float64)
    whole = nn.ModuleDict({"net": net, "scale": scale})
    net[0].requires_grad_(False)

    def inner():
        return (scale(torch.ones(1, dtype=torch.float64)) * net[2].weight.square()).sum() + outer()

    hg = bilevel_torch.FirstOrder(whole, scale.named_parameters(), optimizer=SGD).backward(inner, outer)
    assert [v.shape for v in hg.adjoint] == [(1, 5), (1,)]
    assert torch.equal(scale.weight.grad, hg.grad["weight"])
    assert float(hg.grad["weight"]) != 0


def test_negative_curvature_is_reported(quadratic):
    net, hparams, _, outer = quadratic
    method = bilevel_torch.FirstOrder(net, hparams, optimizer=partial(torch.optim.SGD, lr=0.5))

    def inner():
        return -net(hparams)

    for _ in range(5):
        method.backward(inner, outer, on_failure="ignore")
    with pytest.warns(bl.SolverWarning, match="v grows, because"):
        hg = method.backward(inner, outer)
    assert hg.info.status == bl.Status.DIVERGED
    with pytest.raises(bl.SolverError, match=r"weight_decay: the damping\. The residual is .* of"):
        method.backward(inner, outer, on_failure="raise")
    damped = partial(torch.optim.SGD, lr=0.1, weight_decay=4.0)
    method = bilevel_torch.FirstOrder(net, hparams, optimizer=damped, steps=200)
    hg = method.backward(inner, outer, on_failure="raise")
    expected = -(net.weight.detach() - 3) / (4 - net.curvatures)
    np.testing.assert_allclose(hg.grad, expected, rtol=1e-6)


@pytest.mark.parametrize("optimizer", [None, SGD])
def test_a_nan_in_the_first_call_is_forgotten(quadratic, optimizer):
    net, hparams, inner, outer = quadratic
    expected = bilevel_torch.FirstOrder(net, hparams, optimizer=optimizer).backward(inner, outer)
    method = bilevel_torch.FirstOrder(net, hparams, optimizer=optimizer)
    with pytest.raises(bl.SolverError, match="not finite"):
        method.backward(inner, lambda: outer() * float("nan"))
    assert torch.equal(method.backward(inner, outer).grad, expected.grad)


def test_nan_raises_and_leaves_the_state(quadratic):
    net, hparams, inner, outer = quadratic
    method = bilevel_torch.FirstOrder(net, hparams, optimizer=SGD)
    method.backward(inner, outer)
    before, grad = copy.deepcopy(method.state_dict()), hparams.grad.clone()
    nan = float("nan")
    for losses in ((lambda: inner() * nan, outer), (inner, lambda: outer() * nan)):
        with pytest.raises(bl.SolverError, match=r"not finite, so \.grad is as before"):
            method.backward(*losses)
    assert torch.equal(hparams.grad, grad)
    assert all(torch.equal(a, b) for a, b in zip(before["adjoint"], method.state_dict()["adjoint"], strict=True))
    assert method.backward(*losses, on_failure="ignore").info.status == bl.Status.NON_FINITE
