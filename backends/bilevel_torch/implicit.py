"""The inner training as a differentiable function of its hyperparameters."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch

from bilevel.config import get_linear_solver
from bilevel.convergence import OnFailure, check_on_failure, report
from bilevel.dependence import warn_of_dependence
from bilevel.hypergradient import SolverSpec, combine
from bilevel.linear_solvers import LinearSolver
from bilevel.linearization import Dependence
from bilevel.methods.implicit import Implicit, pull_back
from bilevel.operators.lanczos import spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.spaces.array import Args, V
from bilevel.spaces.tree import leaves, leaves_with_paths, tree_map, with_leaves
from bilevel.validation import check_trees
from bilevel_torch.autograd import as_graph_leaves, evaluate, no_grad_no_autocast
from bilevel_torch.backend import TorchBackend, check_supported
from bilevel_torch.trees import tree_of

Train = Callable[..., Any]


def implicit_minimizer(
    inner: Callable[..., torch.Tensor], solver: SolverSpec = "cg", *, on_failure: OnFailure = "warn"
) -> Callable[[Train], Train]:
    """Return a decorator that makes a training function differentiable, by the implicit function theorem.

        solve = implicit_minimizer(inner, solver="cg")(train)
        outer(solve(hparams, *args)).backward()         # the hypergradient reaches hparams.grad

    ``train(hparams, *args) -> params`` is run once on detached tensors and never differentiated, so it may take any
    steps. In the backward pass, one linear solve at its result and one cross product give

        dF/dλ = −(∂²L/∂λ∂w)ᵀ v       where   [∂²L/∂w²] v = dF/dw

    (Lorraine, Vicol & Duvenaud, AISTATS 2020, theorem 1), for hparams and for every tensor in ``args`` that requires a
    gradient. The error grows with the distance from the minimum: see `bl.diagnose`.

    The derivative is of first order and uses only the data of this process. For ``create_graph=True``, use
    `bilevel_jax.implicit_minimizer`. For several ranks, use `hypergradient` with `DataParallel`.

    Args:
        inner: L, (params, hparams, *args) -> scalar, which ``train`` minimizes over params, with the same ``args``. It
            must compute with the params that are passed (`torch.func.functional_call`). Each backward pass evaluates it
            once: in train mode, this updates the statistics of BatchNorm and draws dropout masks.
        solver: a linear solver, as in `hypergradient`. `bilevel.WarmStart` starts each solve from the last solution.
        on_failure: as in `hypergradient`. Errors and warnings come in the backward pass.

    Returns:
        The decorator. ``hparams`` is a tree of tensors. ``args`` are any objects, in dicts, lists and tuples. (Pass a
        module's parameters as a dict to give them a derivative.) The result has the structure of the tree of
        floating-point tensors that ``train`` returns. Compute the outer loss with the result, not with the trained
        module. Do not change the result in place before the backward pass. So a returned parameter of a module must not
        be trained further before it.

    Raises:
        TypeError, ValueError: if the solver is not linear (``unrolled``), or ``train`` does not return such a tree. In
            the backward pass, if L does not depend on params or hparams.

    >>> import torch, bilevel_torch
    >>> solve = bilevel_torch.implicit_minimizer(lambda w, h: ((w - h) ** 2).sum())(lambda h: h.clone())
    >>> h = torch.tensor([3.0], requires_grad=True)
    >>> (solve(h) ** 2).sum().backward()
    >>> h.grad
    tensor([6.])
    """
    method = get_linear_solver(solver, "implicit_minimizer")
    check_on_failure(on_failure)

    def decorate(train: Train) -> Train:
        @wraps(train)
        def solve(hparams: object, *args: object) -> Any:
            for path, leaf in leaves_with_paths({"hparams": hparams, "args": args}):
                if isinstance(leaf, torch.Tensor):
                    check_supported(path, leaf)
            return _Call(inner, method, on_failure)(train, tree_of("hparams", hparams), args)

        return solve

    return decorate


@dataclass(frozen=True)
class _Call:
    """The arguments of `implicit_minimizer`, which all calls share."""

    inner: Callable[..., torch.Tensor]
    solver: LinearSolver[Any]
    on_failure: OnFailure
    backend: ClassVar[TorchBackend] = TorchBackend()

    def __call__(self, train: Train, hparams: object, args: Args) -> Any:
        given = [hparams, *args]
        varied = [t for t in leaves(given) if _is_varied(t)]
        with torch.enable_grad():
            found = train(*_replace(given, [t.detach() for t in varied]))
        check_trees(self.backend, {"the result of the training": found}, {})
        return with_leaves(found, _Minimum.apply(self, found, given, *varied))

    def pull(self, params: V, given: list[object], varied: list[torch.Tensor], grads: V) -> list[torch.Tensor]:
        """Return the derivatives of F by the varied tensors, from the derivatives by params."""
        varied, backend = [t.detach().requires_grad_() for t in varied], self.backend
        with no_grad_no_autocast(params):
            w, _ = as_graph_leaves(params, ())
            at = backend.inner_of(evaluate(self.inner, w, *_replace(given, varied)), w, varied)
            A = LinearOperator(backend.space(w), at.vjp_params)
            value: Any = torch.zeros(())  # F is unknown here
            pulled = pull_back(backend, self.solver, A, at, grads, None)
            hg = combine(backend, value, None, pulled, varied)
            warn_of_dependence(backend, w, given[0], None, _of_hparams(pulled.dependence, given[0]))
            report(backend, hg.info, Implicit(self.solver), self.on_failure, curvature=lambda: spectrum(A))
            return hg.grad


class _Minimum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, found: object, given: list[object], *varied: torch.Tensor) -> Any:
        out = tuple(t.detach() for t in leaves(found))
        ctx.call, ctx.given, ctx.structure = call, given, tree_map(lambda _: 0, found)
        ctx.save_for_backward(*out, *varied)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # with PyTorch's once_differentiable, some callers would get a zero
            raise RuntimeError(
                "implicit_minimizer has only a first derivative. Do not differentiate it with create_graph=True or use "
                "it in an inner loss. bilevel_jax.implicit_minimizer has higher derivatives."
            )
        count = len(grad_outputs)
        params, grads = (with_leaves(ctx.structure, new) for new in (ctx.saved_tensors[:count], grad_outputs))
        return None, None, None, *ctx.call.pull(params, ctx.given, list(ctx.saved_tensors[count:]), grads)


def _is_varied(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _replace(tree: V, tensors: Iterable[torch.Tensor]) -> V:
    """Return a tree with its tensors that require a gradient replaced by these tensors, in order."""
    it = iter(tensors)
    return tree_map(lambda t: next(it) if _is_varied(t) else t, tree)


def _of_hparams(used: Dependence | None, hparams: object) -> Dependence | None:
    """Return the dependence on the leaves of hparams, from the dependence on all varied tensors.

    A leaf that requires no gradient counts as used.
    """
    if used is None:
        return None
    varied = iter(used.hparams)
    return used._replace(hparams=[next(varied) if _is_varied(t) else True for t in leaves(hparams)])
