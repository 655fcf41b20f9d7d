"""The inner training as one differentiable function of its hyperparameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch

from bilevel import hypergradient_from
from bilevel.config import get_solver
from bilevel.convergence import OnFailure, check_on_failure
from bilevel.protocols import HypergradientMethod, Linearization
from bilevel.spaces.tree import leaves, tree_map, with_leaves
from bilevel.validation import check_trees
from bilevel_torch.autograd import evaluate, own_arithmetic, variables
from bilevel_torch.backend import TorchBackend, check_supported
from bilevel_torch.trees import tree_of

Train = Callable[..., Any]


def implicit_minimizer(
    inner: Callable[..., torch.Tensor], solver: Any = "cg", *, on_failure: OnFailure = "warn"
) -> Callable[[Train], Train]:
    """Return a decorator that makes a training function differentiable, by the implicit function theorem.

        solve = implicit_minimizer(inner, solver="cg")(train)
        outer(solve(hparams, *args)).backward()         # the hypergradient reaches hparams.grad

    ``train(hparams, *args) -> params`` may do whatever it likes, in as many steps as it likes: it is run once, on
    detached tensors, and never differentiated. Backwards, one linear solve at its result and one cross product give

        dF/dλ = −(∂²L/∂λ∂w)ᵀ v       where   [∂²L/∂w²] v = dF/dw

    (Lorraine, Vicol & Duvenaud, AISTATS 2020, theorem 1), for hparams and for every tensor in ``args`` that requires a
    gradient. The result is only as good as the minimum: see `bl.diagnose`.

    Args:
        inner: L, (params, hparams, *args) -> scalar, which ``train`` minimizes over params; it takes the very arguments
            that ``train`` takes. It must compute with the params it is handed (`torch.func.functional_call`). Each
            backward pass evaluates it once: in train mode BatchNorm's statistics move, and dropout draws.
        solver: a linear solver, as in `hypergradient`; `bilevel.WarmStart` starts each solve from the last.
        on_failure: as in `hypergradient`; raised or warned of in the backward pass.

    Returns:
        The decorator. ``hparams`` is a tree of tensors, ``args`` are anything, in dicts, lists and tuples (pass a
        module's parameters as a dict for them to have a derivative). The result has the structure of what ``train``
        returns, a tree of floating-point tensors; compute the outer loss with it, not with the module that was trained.
        Do not change it in place before the backward pass: a module's own parameters may be returned, if they are not
        trained on before that.

    Raises:
        TypeError, ValueError: for a solver that is no linear one (``unrolled``), or a ``train`` that returns no such
            tree; in the backward pass, if L does not depend on params or hparams.

    The derivative is one of first order, and of this process's data alone: for ``create_graph=True`` there is
    `bilevel_jax.implicit_minimizer`, for several ranks `hypergradient` with `DataParallel`.

    >>> import torch, bilevel_torch
    >>> solve = bilevel_torch.implicit_minimizer(lambda w, h: ((w - h) ** 2).sum())(lambda h: h.clone())
    >>> h = torch.tensor([3.0], requires_grad=True)
    >>> (solve(h) ** 2).sum().backward()
    >>> h.grad
    tensor([6.])
    """
    method = get_solver(solver)
    if isinstance(method, HypergradientMethod):
        raise TypeError(
            f"implicit_minimizer: {type(method).__name__} differentiates a training of its own, not yours: use "
            "bl.hypergradient, or a linear solver here."
        )
    check_on_failure(on_failure)

    def decorate(train: Train) -> Train:
        @wraps(train)
        def solve(hparams: Any, *args: Any) -> Any:
            check_supported({"hparams": hparams, "args": args})
            return _Call(inner, method, on_failure)(train, tree_of("hparams", hparams), args)

        return solve

    return decorate


@dataclass(frozen=True)
class _Call:
    """What stays the same from call to call."""

    inner: Callable[..., torch.Tensor]
    solver: Any
    on_failure: OnFailure
    backend: ClassVar[TorchBackend] = TorchBackend()

    def __call__(self, train: Train, hparams: Any, args: tuple[Any, ...]) -> Any:
        given = [hparams, *args]
        varied = [t for t in leaves(given) if _is_varied(t)]
        with torch.enable_grad():
            found = train(*_replace(given, [t.detach() for t in varied]))
        check_trees(self.backend, {"the result of the training": found}, {})
        return with_leaves(found, _Minimum.apply(self, found, given, *varied))

    def pull(self, params: Any, given: list[Any], varied: list[torch.Tensor], grads: Any) -> Any:
        """Return dF by what is varied from dF by params."""
        varied = [t.detach().requires_grad_() for t in varied]
        with own_arithmetic(params):
            w, _ = variables(params, ())
            at = self.backend.inner_of(evaluate(self.inner, w, *_replace(given, varied)), w, varied)
            linearization = Linearization(torch.zeros(()), grads, None, at.hvp, at.cross_vjp)
            return hypergradient_from(
                linearization, solver=self.solver, backend=self.backend, on_failure=self.on_failure
            ).grad


class _Minimum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, found: Any, given: list[Any], *varied: torch.Tensor) -> Any:
        out = tuple(t.detach() for t in leaves(found))
        ctx.call, ctx.given, ctx.structure = call, given, tree_map(lambda _: 0, found)
        ctx.save_for_backward(*out, *varied)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # PyTorch's once_differentiable would let some callers read a zero
            raise RuntimeError(
                "implicit_minimizer has a first derivative only, so it cannot be differentiated with "
                "create_graph=True, nor be part of an inner loss. bilevel_jax.implicit_minimizer has higher ones."
            )
        count = len(grad_outputs)
        params, grads = (with_leaves(ctx.structure, new) for new in (ctx.saved_tensors[:count], grad_outputs))
        return None, None, None, *ctx.call.pull(params, ctx.given, list(ctx.saved_tensors[count:]), grads)


def _is_varied(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _replace(tree: Any, tensors: Any) -> Any:
    """Return a tree with these tensors in the place of those that require a gradient, in order."""
    it = iter(tensors)
    return tree_map(lambda t: next(it) if _is_varied(t) else t, tree)
