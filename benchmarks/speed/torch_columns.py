"""Hypergradients in PyTorch: loops as a careful user writes them, and ours."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import grad

import bilevel as bl
import bilevel_torch
from benchmarks.speed.torch_workloads import Workload, penalty

Tensors = list[torch.Tensor]


def columns(w: Workload, method: str, count: int) -> dict[str, Callable[[], Tensors]]:
    """Return what computes the hypergradient of a workload, by column; ``plain step`` is a training step."""
    made: dict[str, Callable[[], Any]] = {"plain step": plain_step(w)}
    if method == "unrolled":
        made |= {"hand-written": lambda: unrolled(w, count)}
        made |= {"ours": lambda: ours(w, bl.Unrolled(count, w.step_size, checkpoint=False))}
        made |= {"ours, iterates": lambda: ours(w, bl.Unrolled(count, w.step_size))}
        made |= {"ours, checkpoints": lambda: ours(w, bl.Unrolled(count, w.step_size, checkpoint=True))}
        return _waiting(made, w)
    hand, in_place = {"neumann": (neumann, neumann_in_place), "cg": (cg, cg_in_place)}[method]
    solver = (
        bl.CG(maxiter=count, rtol=None, damping=0.0)
        if method == "cg"
        else bl.Neumann(terms=count, step_size=w.step_size)
    )
    made |= {"hand-written": lambda: hand(w, count), "hand-written, in place": lambda: in_place(w, count)}
    made |= {"ours": lambda: ours_from_losses(w, solver), "ours, functions": lambda: ours(w, solver)}
    return _waiting(made, w)


def _waiting(made: dict[str, Callable[[], Any]], w: Workload) -> dict[str, Callable[[], Any]]:
    """Let each column wait for the device."""

    def waiting(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            result = call()
            w.synchronize()
            return result

        return run

    return {name: waiting(call) for name, call in made.items()}


def plain_step(w: Workload) -> Callable[[], Tensors]:
    """Return a step of Adam with a learning rate of zero, so that the weights stay."""
    optimizer = torch.optim.Adam(w.params, lr=0.0)
    constants = [h.detach() for h in w.log_decays]

    def step() -> Tensors:
        optimizer.zero_grad()
        loss = w.loss(w.net, *w.train) + penalty(w.params, constants)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # here, so that the gradients are no part of another column's memory
        return [loss.detach()]

    return step


def linearized(w: Workload) -> tuple[Tensors, Tensors]:
    """Return ∇L with its graph, and ∂F/∂w."""
    gradient = grad(w.inner_loss(), w.params, create_graph=True)
    return list(gradient), list(grad(w.outer_loss(), w.params))


def combined(w: Workload, gradient: Tensors, v: Tensors) -> Tensors:
    """Return −(∂²L/∂λ∂w)ᵀ v; these outer losses do not depend on λ."""
    return [-c for c in grad(gradient, w.log_decays, v)]


def neumann(w: Workload, count: int) -> Tensors:
    """Sum the series, with new tensors at each step."""
    gradient, v = linearized(w)
    params, total = w.params, v
    for _ in range(count):
        product = grad(gradient, params, v, retain_graph=True)
        v = [a - w.step_size * b for a, b in zip(v, product, strict=True)]
        total = [a + b for a, b in zip(total, v, strict=True)]
    return combined(w, gradient, [w.step_size * t for t in total])


def neumann_in_place(w: Workload, count: int) -> Tensors:
    """Sum the series in two sets of tensors."""
    gradient, v = linearized(w)
    params, total = w.params, [a.clone() for a in v]
    for _ in range(count):
        torch._foreach_sub_(v, grad(gradient, params, v, retain_graph=True), alpha=w.step_size)
        torch._foreach_add_(total, v)
    torch._foreach_mul_(total, w.step_size)
    return combined(w, gradient, total)


def dot(x: Tensors, y: Tensors) -> torch.Tensor:
    """Return the inner product."""
    return sum(torch.dot(a.flatten(), b.flatten()) for a, b in zip(x, y, strict=True))


def cg(w: Workload, count: int) -> Tensors:
    """Conjugate gradients by the textbook, with new tensors at each step."""
    gradient, r = linearized(w)
    params, p, x = w.params, r, [torch.zeros_like(a) for a in r]
    rr = dot(r, r)
    for _ in range(count):
        product = grad(gradient, params, p, retain_graph=True)
        alpha = rr / dot(p, product)
        x = [a + alpha * b for a, b in zip(x, p, strict=True)]
        r = [a - alpha * b for a, b in zip(r, product, strict=True)]
        new = dot(r, r)
        p = [a + new / rr * b for a, b in zip(r, p, strict=True)]
        rr = new
    return combined(w, gradient, x)


def cg_in_place(w: Workload, count: int) -> Tensors:
    """Conjugate gradients in three sets of tensors; numbers are read, which costs nothing on the CPU."""
    gradient, r = linearized(w)
    params, p, x = w.params, [a.clone() for a in r], [torch.zeros_like(a) for a in r]
    rr = float(dot(r, r))
    for _ in range(count):
        product = grad(gradient, params, p, retain_graph=True)
        alpha = rr / float(dot(p, product))
        torch._foreach_add_(x, p, alpha=alpha)
        torch._foreach_sub_(r, product, alpha=alpha)
        new = float(dot(r, r))
        torch._foreach_mul_(p, new / rr)
        torch._foreach_add_(p, r)
        rr = new
    return combined(w, gradient, x)


def unrolled(w: Workload, count: int) -> Tensors:
    """Let autograd record steps of gradient descent."""
    weights: Tensors = w.params
    for _ in range(count):
        loss = w.inner(dict(zip(w.names, weights, strict=True)), w.log_decays, *w.train)
        gradient = grad(loss, weights, create_graph=True)
        weights = [a - w.step_size * g for a, g in zip(weights, gradient, strict=True)]
    outer = w.outer(dict(zip(w.names, weights, strict=True)), w.log_decays, *w.val)
    return list(grad(outer, w.log_decays))


def ours_from_losses(w: Workload, solver: object) -> Tensors:
    """Hand over the two losses."""
    return bilevel_torch.hypergradient(
        w.inner_loss(), w.outer_loss(), w.params, w.log_decays, solver=solver, on_failure="ignore"
    ).grad


def ours(w: Workload, solver: object, backend: bilevel_torch.TorchBackend | None = None) -> Tensors:
    """Hand over the two functions."""
    return bl.hypergradient(
        bl.Problem(w.inner, w.outer), dict(w.net.named_parameters()), w.log_decays,
        inner_args=w.train, outer_args=w.val, solver=solver, on_failure="ignore", backend=backend,
    ).grad  # fmt: skip
