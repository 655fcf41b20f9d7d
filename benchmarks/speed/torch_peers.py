"""The same hypergradients by other libraries for PyTorch, those that are installed."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import torch
from torch.autograd import grad

from benchmarks.speed.torch_columns import Tensors
from benchmarks.speed.torch_workloads import Workload, penalty


def peers(w: Workload, method: str, count: int) -> dict[str, Callable[[], Tensors]]:
    """Return what computes the hypergradient of a workload, by library."""
    made: dict[str, Callable[[], Tensors]] = {}
    with suppress(ImportError):
        import torchopt  # noqa: F401

        torchopt_of = torchopt_unrolled if method == "unrolled" else partial(torchopt_implicit, method=method)
        made["TorchOpt"] = partial(torchopt_of, w, count)
    with suppress(ImportError):
        if method == "unrolled":
            import higher  # noqa: F401

            made["higher"] = partial(higher_unrolled, w, count)
        else:
            import betty  # noqa: F401

            made["Betty"] = partial(betty_implicit, w, count, method=method)
    return made


def torchopt_implicit(w: Workload, count: int, method: str) -> Tensors:
    """Differentiate a custom root; its CG starts with a product of zeros, one more than the others."""
    import torchopt

    solve = (
        torchopt.linear_solve.solve_cg(maxiter=count, rtol=0.0)
        if method == "cg"
        else torchopt.linear_solve.solve_inv(ns=True, maxiter=count, alpha=w.step_size)
    )

    def inner(params: tuple[torch.Tensor, ...], log_decays: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return w.inner(dict(zip(w.names, params, strict=True)), list(log_decays), *w.train)

    @torchopt.diff.implicit.custom_root(torch.func.grad(inner), argnums=1, solve=solve)
    def minimum(params: tuple[torch.Tensor, ...], log_decays: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return params

    params = tuple(p.detach().requires_grad_() for p in w.params)
    found = minimum(params, tuple(w.log_decays))
    outer = w.outer(dict(zip(w.names, found, strict=True)), w.log_decays, *w.val)
    return list(grad(outer, w.log_decays))


def torchopt_unrolled(w: Workload, count: int) -> Tensors:
    """Take steps of its differentiable SGD on the module, and put it back."""
    import torchopt

    before = torchopt.extract_state_dict(w.net, by="reference")
    optimizer = torchopt.MetaSGD(w.net, lr=w.step_size)
    try:
        for _ in range(count):
            # Its weights are no nn.Parameters any more, but keep their places in the module.
            optimizer.step(w.loss(w.net, *w.train) + penalty(_weights(w), w.log_decays))
        return list(grad(w.loss(w.net, *w.val), w.log_decays))
    finally:
        torchopt.recover_state_dict(w.net, before)


def _weights(w: Workload) -> Tensors:
    places = (name.rpartition(".") for name in w.names)
    return [getattr(w.net.get_submodule(path), leaf) for path, _, leaf in places]


def higher_unrolled(w: Workload, count: int) -> Tensors:
    """Take steps of SGD on a functional copy of the module."""
    import higher

    optimizer = torch.optim.SGD(w.net.parameters(), lr=w.step_size)
    with higher.innerloop_ctx(w.net, optimizer) as (net, steps):
        for _ in range(count):
            steps.step(w.loss(net, *w.train) + penalty(list(net.parameters()), w.log_decays))
        return list(grad(w.loss(net, *w.val), w.log_decays))


def betty_implicit(w: Workload, count: int, method: str) -> Tensors:
    """Call the functions that its engine calls, on the least that stands in for its problems."""
    from betty.configs import Config
    from betty.hypergradient.cg import cg
    from betty.hypergradient.neumann import neumann

    inner = SimpleNamespace(
        paths=[], cur_batch=w.train, training_step_exec=lambda batch: w.inner_loss(),
        config=Config(cg_iterations=count, neumann_iterations=count, neumann_alpha=w.step_size),
        trainable_parameters=lambda: w.params, parameters=lambda: w.params,
    )  # fmt: skip
    outer = SimpleNamespace(trainable_parameters=lambda: w.log_decays)
    v = grad(w.outer_loss(), w.params)
    return list((cg if method == "cg" else neumann)(v, inner, outer))
