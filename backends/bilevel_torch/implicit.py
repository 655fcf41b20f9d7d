"""Training functions that PyTorch differentiates by the implicit function theorem."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from bilevel.config import get_linear_solver
from bilevel.convergence import OnFailure, check_on_failure
from bilevel.hypergradient import SolverSpec
from bilevel.spaces.tree import leaves_with_paths
from bilevel.trainings import FIXED_POINT, ROOT, Condition, bind_arguments, minimum
from bilevel_torch.backend import TorchBackend
from bilevel_torch.implicit_rules import Training
from bilevel_torch.trees import tree_of

Train = Callable[..., Any]


def implicit_minimizer(
    inner: Callable[..., torch.Tensor],
    solver: SolverSpec = "cg",
    *,
    prox: Callable[..., Any] | None = None,
    step_size: float = 1.0,
    equality: Callable[..., Any] | None = None,
    inequality: Callable[..., Any] | None = None,
    on_failure: OnFailure = "warn",
    has_aux: bool = False,
) -> Callable[[Train], Train]:
    """Return a decorator that makes a training function differentiable, by the implicit function theorem.

        solve = implicit_minimizer(inner, solver="cg")(train)
        outer(solve(hparams, *args)).backward()         # the hypergradient reaches hparams.grad

    ``train(hparams, *args) -> params`` is run once on detached tensors and never differentiated, so it may take any
    steps. In the backward pass, one linear solve at its result and one cross product give

        dF/dλ = −(∂²L/∂λ∂w)ᵀ v       where   [∂²L/∂w²] v = dF/dw

    (Lorraine, Vicol & Duvenaud, AISTATS 2020, theorem 1), for hparams and for every tensor among the arguments that
    requires a gradient. The error grows with the distance from the minimum: see `bl.diagnose`.

    It also works under `torch.func` (``grad``, ``jacrev``, ``vmap``, and forward mode by ``jvp`` and ``jacfwd``). Each
    entry of a batch takes one training or one solve. In reverse mode, there are also second derivatives (by
    ``create_graph=True``), so ``inner`` may call the solution of another level. A product with them takes one solve and
    a third derivative of L. For higher derivatives, use `bilevel_jax.implicit_minimizer`. The derivatives use only the
    data of this process. For several ranks, use `hypergradient` with `DataParallel`.

    Args:
        inner: L, (params, hparams, *args) -> scalar, which ``train`` minimizes over params, with the same ``args``. It
            receives keyword arguments and defaults of ``train`` under the same names, if it has parameters of these
            names. The others, such as a number of steps, do not change the minimum. It must compute with the params
            that are passed (`torch.func.functional_call`). Each backward pass evaluates it once: in train mode, this
            updates the statistics of BatchNorm and draws dropout masks.
        prox: the proximal operator of a convex function with kinks that ``train`` minimizes in addition to L, such as
            ``bl.prox.l1()``, or a projection on a convex set. It is (v, hparams, step_size) -> a tree like params, as
            in `bl.Proximal`. The linear system is the symmetric one of `bl.Proximal`: for an L1 norm or bounds, the
            system on the support. Only first derivatives are right for `bl.prox.nuclear_norm`.
        step_size: of the proximal step, as in `bl.Proximal`. In float32, it should be near one over the largest
            curvature of L, if that is far from 1.
        equality, inequality: constraints equality(w, hparams, *args) = 0 and inequality(w, hparams, *args) <= 0, as in
            `bl.Constrained`. Then ``train`` returns the params of `bl.Constrained`: a dict with "w" and the
            multipliers, for example from `bl.with_multipliers` or `bl.constrained_fit`. ``inner`` receives w only. The
            linear system is indefinite: use "minres", "gmres" or "exact". Constraints that are about to become active
            are not found.
        solver: a linear solver, as in `hypergradient`. `bilevel.WarmStart` starts each solve from the last solution.
        on_failure: as in `hypergradient`. Errors and warnings come in the backward pass.
        has_aux: ``train`` returns (params, aux), and so does the result of the decorator. Tensors in aux are detached.
            Under ``vmap``, aux is a list with the aux of each training.

    Returns:
        The decorator. ``hparams`` is a tree of tensors. ``args`` are any objects, in dicts, lists and tuples. (Pass a
        module's parameters as a dict to give them a derivative.) The result has the structure of the tree of
        floating-point tensors that ``train`` returns. Frozen parameters of a module count as constants, if others are
        not frozen. Compute the outer loss with the result, not with the trained module. Do not change the result in
        place before the backward pass. So a returned parameter of a module must not be trained further before it.
        If one module has several trainings before the backward pass, return copies.

    Raises:
        TypeError, ValueError: if the solver is not linear (``unrolled``), the arguments do not fit ``train`` or
            ``inner``, or ``train`` does not return such a tree. In the backward pass, if L does not depend on params or
            hparams.

    >>> import torch, bilevel_torch
    >>> solve = bilevel_torch.implicit_minimizer(lambda w, h: ((w - h) ** 2).sum())(lambda h: h.clone())
    >>> h = torch.tensor([3.0], requires_grad=True)
    >>> (solve(h) ** 2).sum().backward()
    >>> h.grad
    tensor([6.])
    """
    condition, function = minimum(TorchBackend(), inner, prox, step_size, equality, inequality)
    return _decorator(condition, function, solver, on_failure, has_aux)


def implicit_root(
    residual: Callable[..., Any],
    solver: SolverSpec = "gmres",
    *,
    on_failure: OnFailure = "warn",
    has_aux: bool = False,
) -> Callable[[Train], Train]:
    """Return a decorator that makes a solver of equations differentiable, by the implicit function theorem.

    ``my_solver(hparams, *args) -> params`` is run once on detached tensors and never differentiated. It returns params
    with residual(params, hparams) = 0. In the backward pass, one linear solve and one cross product give

        dF/dλ = −(∂residual/∂λ)ᵀ v       where   (∂residual/∂w)ᵀ v = dF/dw

    for hparams and for every tensor among the arguments that requires a gradient, as in `bilevel.Root`. It works under
    `torch.func`, and twice in reverse mode, as `implicit_minimizer` does.

    Args:
        residual: r, (params, hparams, *args) -> a tree like params. See ``inner`` of `implicit_minimizer`.
        solver: a linear solver for systems that are not symmetric: "gmres", "bicgstab", "normal-cg", or "exact" for few
            unknowns.
        on_failure: as in `hypergradient`. Errors and warnings come in the backward pass.
        has_aux: as in `implicit_minimizer`.

    Returns:
        The decorator, as for `implicit_minimizer`.

    Raises:
        TypeError, ValueError: if the solver is not linear, the arguments do not fit, or the solver of equations does
            not return a tree of floating-point tensors. In the backward pass, if ``residual`` is not like params, or
            does not depend on params or hparams.

    >>> import torch, bilevel_torch
    >>> square_root = bilevel_torch.implicit_root(lambda x, a: x**2 - a)(torch.sqrt)
    >>> a = torch.tensor([4.0], requires_grad=True)
    >>> square_root(a).sum().backward()
    >>> a.grad
    tensor([0.2500])
    """
    return _decorator(ROOT, residual, solver, on_failure, has_aux)


def implicit_fixed_point(
    step: Callable[..., Any],
    solver: SolverSpec = "gmres",
    *,
    on_failure: OnFailure = "warn",
    has_aux: bool = False,
) -> Callable[[Train], Train]:
    """Return a decorator that makes an iteration differentiable by its fixed point, without differentiating the steps.

    It is `implicit_root` of w − step(w, λ), as in `bilevel.FixedPoint` (Bai, Kolter & Koltun, NeurIPS 2019).

    Args:
        step: (params, hparams, *args) -> the next params, with the same structure, shapes and dtypes. It may be a step
            of another algorithm than the one that found params, such as a proximal gradient step.
        solver: as in `implicit_root`. ``bl.Neumann(step_size=1.0)`` sums over the last ``terms`` steps.
        on_failure: as in `hypergradient`. Errors and warnings come in the backward pass.
        has_aux: as in `implicit_minimizer`.

    Returns:
        The decorator, as for `implicit_minimizer`.

    Raises:
        TypeError, ValueError: as in `implicit_root`.

    >>> import torch, bilevel_torch
    >>> solve = bilevel_torch.implicit_fixed_point(lambda w, h: w / 2 + h)(lambda h: 2 * h)
    >>> h = torch.tensor([3.0], requires_grad=True)
    >>> solve(h).sum().backward()
    >>> h.grad
    tensor([2.])
    """
    return _decorator(FIXED_POINT, step, solver, on_failure, has_aux)


def _decorator(
    condition: Condition, function: Callable[..., Any], solver: SolverSpec, on_failure: OnFailure, has_aux: bool
) -> Callable[[Train], Train]:
    condition.check_function(function)
    linear_solver = get_linear_solver(solver, condition.decorator)
    check_on_failure(on_failure)

    def decorate(*given: Train, **named: object) -> Train:
        condition.check_training(function, *given, **named)
        train = given[0]

        @wraps(train)
        def solve(*args: object, **named: object) -> Any:
            arguments = bind_arguments(condition, train, function, args, named)
            arguments = arguments._replace(hparams=tree_of("hparams", arguments.hparams))
            for path, leaf in leaves_with_paths(arguments._asdict()):
                if isinstance(leaf, torch.Tensor):
                    TorchBackend().check_leaf(path, leaf)
            params, aux = Training(train, condition, function, linear_solver, on_failure, has_aux, arguments)()
            return (params, aux) if has_aux else params

        return solve

    return decorate
