"""The derivatives of an implicit function w*(λ), as rules for autograd and torch.func."""
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

from bilevel.convergence import OnFailure, report, warn_if_at_kink
from bilevel.dependence import warn_of_dependence
from bilevel.hypergradient import combine
from bilevel.linear_solvers.linear_solver import LinearSolver, run_solver
from bilevel.linearization import Dependence, LinearizedMap
from bilevel.methods.implicit import Implicit, pull_back, solve_reduced
from bilevel.operators.lanczos import spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.problems.optimality import distance, of_hparams_only
from bilevel.problems.proximal import Proximal
from bilevel.results import SolverInfo
from bilevel.spaces.tree import leaves, tree_map, with_leaves
from bilevel.trainings import Arguments, Condition, check_training_result, params_noted, training_name
from bilevel.validation import check_like, leaf_names
from bilevel_torch.autograd import as_graph_leaves, evaluate, grad, solver_mode
from bilevel_torch.backend import TorchBackend
from bilevel_torch.trees import fill, prune

Tensors = Sequence[torch.Tensor]
CHANGED = (
    "{}: params or arguments of a training have changed in place before its backward pass. If one "
    "module is trained several times before it, for example for each fold, return copies: "
    "{{name: p.detach().clone() for name, p in net.named_parameters()}}."
)


class _Point(NamedTuple):
    """The condition on params as a graph.

    Attributes:
        w: params without the frozen leaves, as variables.
        lam: λ, as variables.
        value: the value of the condition's function.
        prox: x -> the proximal operator at x, a tree like w, if the condition has one.
    """

    w: Any
    lam: list[torch.Tensor]
    value: Any
    prox: Callable[[Any], Any]


@dataclass
class Training:
    """A call of a training. All the tensors in its arguments are inputs of the rules below.

    A tensor *moves* if PyTorch asks for a derivative by it. In this file, λ is the list of the moving tensors.

    Attributes:
        condition: the kind of the function.
        function: the condition on params: an inner loss, a step or a residual.
        given: the arguments of the call. The methods replace their tensors by other tensors in the same order.
        structure: set by `run`: a tree like params, with 0 for each leaf.
        frozen: set by `run`: whether each leaf of params is a frozen parameter.
        aux: the auxiliary results of the runs, of which there are several under vmap.
    """

    train: Callable[..., Any]
    condition: Condition
    function: Callable[..., Any]
    solver: LinearSolver[Any]
    on_failure: OnFailure
    has_aux: bool
    given: Arguments
    structure: Any = None
    frozen: Sequence[bool] = ()
    aux: list[Any] = field(default_factory=list)
    backend: ClassVar[TorchBackend] = TorchBackend()

    def __call__(self) -> tuple[Any, Any]:
        """Run the training. Return params, which PyTorch can differentiate, and the auxiliary result."""
        out = _Solution.apply(self, *filter(_is_tensor, leaves(self.given)))
        return with_leaves(self.structure, out), self.aux.pop()

    def run(self, tensors: Tensors) -> Tensors:
        """Run the training on detached tensors. Return the leaves of params."""
        given = self._arguments(t.detach() if t.requires_grad else t for t in tensors)
        with torch.enable_grad():
            result = self.train(given.hparams, *given.args, **given.shared, **given.own)
        params, aux = check_training_result(self.backend, training_name(self.train), result, self.has_aux)
        trained = leaves(params)
        self.aux.append(tree_map(lambda leaf: leaf.detach() if _is_tensor(leaf) else leaf, aux))
        self.structure = tree_map(lambda _: 0, params)
        # If none requires a gradient, the training has detached its result, and no leaf is frozen.
        flagged = any(t.requires_grad for t in trained)
        self.frozen = [flagged and isinstance(t, torch.nn.Parameter) and not t.requires_grad for t in trained]
        return tuple(t.detach() for t in trained)

    def pull(self, moves: Sequence[bool], grads: Tensors, params: Tensors, tensors: Tensors) -> Tensors:
        """Return the derivatives of F by the moving tensors, from the derivatives by params. Append the leaves of v."""
        with solver_mode(params):
            point = self._point(moves, params, tensors)
            at = self._differentiate(point)
            A = self._operator(at, point.w)
            cotangent = prune(with_leaves(self.structure, grads), self.frozen)
            pulled = pull_back(self.backend, self.solver, A, at, cotangent, None)
            value: Any = torch.zeros(())  # F is unknown here
            hg = combine(self.backend, value, None, pulled, point.lam)
            self._report(hg.info, A, moves, pulled.dependence)
            return (*hg.grad, *self._whole(params, at.adjoint(hg.adjoint, cotangent)))

    def pull_of_pull(
        self, moves: Sequence[bool], changes: Tensors, params: Tensors, tensors: Tensors, v: Tensors
    ) -> Tensors:
        """Return the derivatives of p·u by c, params and the moving tensors, where p = −(∂r/∂λ)ᵀ v, (∂r/∂w)ᵀ v = c.

        u = ``changes`` is like p. By c, the derivative is a = −[∂r/∂w]⁻¹ (∂r/∂λ) u. By params and the moving tensors,
        it is the derivative of −v·((∂r/∂w) a + (∂r/∂λ) u) with fixed v, a and u.
        """
        with solver_mode(params):
            point = self._point(moves, params, tensors)
            w, lam, at = point.w, point.lam, self._differentiate(point)
            A = self._operator(at, w)
            assert at.jvp_hparams is not None
            a, info = self._solve_forward(A, at, A.space.scale(-1.0, at.jvp_hparams(list(changes))))
            self._report(info, A, moves, None)
            adjoint = leaves(prune(with_leaves(self.structure, v), self.frozen))
            variables, along = [*leaves(w), *lam], [*leaves(a), *changes]
            products = _derivatives(self._residuals(point), adjoint, variables, create_graph=True)
            thirds = _derivatives(products, along, variables)
            found = [
                torch.zeros_like(x) if third is None else -third for x, third in zip(variables, thirds, strict=True)
            ]
            count = len(leaves(w))
            of_params = with_leaves(w, found[:count])
            return (*self._whole(params, a), *self._whole(params, of_params), *found[count:])

    def _whole(self, params: Tensors, pruned: Any) -> list[torch.Tensor]:
        """Return the leaves of a pruned tree like params, with zeros for the frozen leaves."""
        return leaves(fill(with_leaves(self.structure, map(torch.zeros_like, params)), pruned))

    def push(self, moves: Sequence[bool], changes: Tensors, params: Tensors, tensors: Tensors) -> Tensors:
        """Return the derivatives of params along changes u of the moving tensors: −[∂r/∂w]⁻¹ (∂r/∂λ) u."""
        with solver_mode(params):
            point = self._point(moves, params, tensors)
            at = self._differentiate(point)
            A = self._operator(at, point.w)
            if at.jvp_hparams is None or at.dependence is None or not any((used := at.dependence()).hparams):
                r = "∂L/∂w" if A.symmetric else self.condition.role
                raise ValueError(f"{r} does not depend on {leaf_names(self.backend, 'hparams', point.lam)}.")
            change, info = self._solve_forward(A, at, at.jvp_hparams(list(changes)))
            self._report(info, A, moves, used)
            return tuple(self._whole(params, A.space.scale(-1.0, change)))

    def _solve_forward(self, A: LinearOperator[Any], at: LinearizedMap[Any, Any], rhs: Any) -> tuple[Any, SolverInfo]:
        """Return t of (∂r/∂w) t = rhs."""
        if at.reduction is not None:
            return solve_reduced(self.solver, A, at, rhs, transposed=False)
        return run_solver(self.solver, A.transposed(), rhs)

    def _point(self, moves: Sequence[bool], params: Tensors, tensors: Tensors) -> _Point:
        copies = [t.detach().requires_grad_() if moving else t for t, moving in zip(tensors, moves, strict=True)]
        given = self._arguments(copies)
        lam = [t for t, moving in zip(copies, moves, strict=True) if moving]
        whole = with_leaves(self.structure, [p.detach() for p in params])
        w, _ = as_graph_leaves(prune(whole, self.frozen), ())
        function = partial(self.function, **given.shared)
        with params_noted(self.condition, training_name(self.train), whole):
            value = evaluate(function, fill(whole, w), given.hparams, *given.args)
        if self.condition.role != "inner":
            check_like(self.backend, self.condition.role, value, "params", whole)
            value = prune(value, self.frozen)

        def prox(x: Any) -> Any:
            assert self.condition.prox is not None
            moved = evaluate(self.condition.prox, fill(whole, x), given.hparams, self.condition.step_size)
            check_like(self.backend, "prox", moved, "params", whole)
            return prune(moved, self.frozen)

        return _Point(w, lam, value, prox)

    def _differentiate(self, point: _Point) -> LinearizedMap[Any, Any]:
        """Return the linearized residual."""
        w, lam, value, prox = point
        role = self.condition.role
        if role == "inner":
            at = self.backend.inner_of(value, w, lam)
            if self.condition.prox is None:
                return at
            step_size = self.condition.step_size
            problem = Proximal(self.function, lambda x, *_: prox(x), self.function, step_size)
            return problem.linearize_step(self.backend, w, lam, (), at)
        at = self.backend.jacobian_of(value, w, lam, role)
        return distance(self.backend, w, lam, at) if role == "step" else of_hparams_only(at)

    def _operator(self, at: LinearizedMap[Any, Any], w: Any) -> LinearOperator[Any]:
        symmetric = self.condition.symmetric_system
        space, indefinite = self.backend.space(w), self.condition.indefinite
        return LinearOperator(space, at.product, symmetric, transpose=at.jvp_params, indefinite=indefinite)

    def _residuals(self, point: _Point) -> Sequence[torch.Tensor | None]:
        """Return the leaves of r, with a graph."""
        w, _, value, prox = point
        if self.condition.role == "inner":
            slopes = grad([value], leaves(w), None, create_graph=True)
            if self.condition.prox is None:
                return slopes
            with torch.enable_grad():
                s = self.condition.step_size
                ends = [x if slope is None else x - s * slope for x, slope in zip(leaves(w), slopes, strict=True)]
                return [x - y for x, y in zip(leaves(w), leaves(prox(with_leaves(w, ends))), strict=True)]
        if self.condition.role == "step":
            with torch.enable_grad():
                return [x - y for x, y in zip(leaves(w), leaves(value), strict=True)]
        return leaves(value)

    def _report(self, info: SolverInfo, A: LinearOperator[Any], moves: Sequence[bool], used: Dependence | None) -> None:
        if used is not None:
            # The flags are about the moving tensors. All other leaves of hparams count as used.
            hparams, of_moving = self.given.hparams, iter(used.hparams)
            of_tensors = iter([not moving or next(of_moving) for moving in moves])
            used = used._replace(hparams=[not _is_tensor(leaf) or next(of_tensors) for leaf in leaves(hparams)])
            warn_of_dependence(self.backend, A.space.like, hparams, None, used)
        method, symmetric = Implicit(self.solver), A.symmetric
        curvature = lambda: spectrum(A)  # noqa: E731
        info = report(self.backend, info, method, self.on_failure, symmetric=symmetric, curvature=curvature)
        if self.on_failure != "ignore":
            warn_if_at_kink(info)

    def _arguments(self, tensors: Iterable[torch.Tensor]) -> Arguments:
        it = iter(tensors)
        return tree_map(lambda leaf: next(it) if _is_tensor(leaf) else leaf, self.given)


@dataclass(frozen=True)
class _Moved:
    """A training, and whether each of its tensors moves. PyTorch's transforms pass this object on unchanged."""

    training: Training
    moves: Sequence[bool]

    def split(self, tensors: Tensors, first: int) -> tuple[Tensors, Tensors, Tensors]:
        """Return the first tensors, the leaves of params, and the tensors in the arguments of the training."""
        last = first + len(self.training.frozen)
        return tensors[:first], tensors[first:last], tensors[last:]


class Rule(torch.autograd.Function):
    """A function that autograd differentiates by a rule. Under vmap, it runs once for each entry of the batch."""

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        """Return stacked results, and the places of their batch dimensions."""
        rows = [
            cls.apply(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
        return stacked, (0,) * len(stacked)


class _Solution(Rule):
    """(training, tensors of its arguments) -> the leaves of params."""

    @staticmethod
    def forward(training: Training, *tensors: torch.Tensor) -> Any:
        return training.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        training, *tensors = inputs
        moves = ctx.needs_input_grad[1:]
        ctx.moved, ctx.count = _Moved(training, moves), len(output)
        # Only these must not change before the derivative. PyTorch raises an error if they do.
        ctx.save_for_backward(*output, *(t for t, moving in zip(tensors, moves, strict=True) if moving))
        ctx.others = [None if moving else t for t, moving in zip(tensors, moves, strict=True)]
        ctx.save_for_forward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        try:
            kept = ctx.saved_tensors
        except RuntimeError as error:  # PyTorch's error about a change in place
            error.add_note(CHANGED.format(ctx.moved.training.condition.decorator))
            raise
        params, saved = kept[: ctx.count], iter(kept[ctx.count :])
        tensors = [next(saved) if t is None else t for t in ctx.others]
        pulled = iter(_Pull.apply(ctx.moved, *grads, *params, *tensors))
        return None, *(next(pulled) if moving else None for moving in ctx.moved.moves)

    @staticmethod
    def jvp(ctx: Any, *changes: torch.Tensor | None) -> Any:
        moved = _Moved(ctx.moved.training, [change is not None for change in changes[1:]])
        return _Push.apply(moved, *(change for change in changes if change is not None), *ctx.saved_tensors)

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        aux = args[0].aux
        before = len(aux)
        result = super().vmap(info, in_dims, *args)
        aux[before:] = [aux[before:]]  # one result: the list of the results of all rows
        return result


class _Pull(Rule):
    """(derivatives by params, params, tensors) -> (derivatives by the moving tensors, v). There is no rule for v."""

    @staticmethod
    def forward(moved: _Moved, *tensors: torch.Tensor) -> Any:
        with _vectorized_named(moved.training.condition):
            return moved.training.pull(moved.moves, *moved.split(tensors, len(moved.training.frozen)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.moved, *tensors = inputs
        adjoint = output[sum(ctx.moved.moves) :]
        ctx.mark_non_differentiable(*adjoint)
        ctx.save_for_backward(*tensors, *adjoint)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        moves, count = ctx.moved.moves, len(ctx.moved.training.frozen)
        found = _PullOfPull.apply(ctx.moved, *grads[: sum(moves)], *ctx.saved_tensors)
        of_moving = iter(found[2 * count :])
        return None, *found[: 2 * count], *(next(of_moving) if moving else None for moving in moves)

    @staticmethod
    def jvp(ctx: Any, *changes: torch.Tensor | None) -> Any:
        raise RuntimeError(
            f"{ctx.moved.training.condition.decorator} has second derivatives in reverse mode only. Use "
            "torch.autograd.grad with create_graph=True, or torch.func.jacrev of torch.func.grad in place of "
            "torch.func.hessian."
        )


class _Derivative(Rule):
    """A derivative without a derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.decorator = inputs[0].training.condition.decorator

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.decorator} has two derivatives in reverse mode, and one in forward mode. Here, another one is "
            f"needed. bilevel_jax.{ctx.decorator} has derivatives of any order."
        )

    jvp = backward


class _PullOfPull(_Derivative):
    @staticmethod
    def forward(moved: _Moved, *tensors: torch.Tensor) -> Any:
        moving, count = sum(moved.moves), len(moved.training.frozen)
        changes, rest = tensors[:moving], tensors[moving + count :]  # the derivatives by params are not needed
        params, given, adjoint = rest[:count], rest[count:-count], rest[-count:]
        with _vectorized_named(moved.training.condition):
            return moved.training.pull_of_pull(moved.moves, changes, params, given, adjoint)


class _Push(_Derivative):
    @staticmethod
    def forward(moved: _Moved, *tensors: torch.Tensor) -> Any:
        with _vectorized_named(moved.training.condition):
            return moved.training.push(moved.moves, *moved.split(tensors, sum(moved.moves)))


def _derivatives(
    outputs: Sequence[torch.Tensor | None], weights: Tensors, inputs: Tensors, create_graph: bool = False
) -> list[torch.Tensor | None]:
    """Return the derivatives of Σ outputs · weights by the inputs. An output is None, or constant, if it is zero."""
    moving = [(x, weight) for x, weight in zip(outputs, weights, strict=True) if x is not None and x.requires_grad]
    if not moving:
        return [None] * len(inputs)
    return grad([x for x, _ in moving], inputs, [weight for _, weight in moving], create_graph=create_graph)


@contextmanager
def _vectorized_named(condition: Condition) -> Iterator[None]:
    """Replace PyTorch's errors about the older vmap, for which a function cannot have a rule."""
    try:
        yield
    except RuntimeError as error:
        if "Batching rule not implemented" in str(error) or "inside of vmap" in str(error):
            raise RuntimeError(
                f"{condition.decorator} has no vectorized Jacobian (vectorize=True, is_grads_batched=True). Call "
                "torch.func.jacrev(solve)(h), or torch.autograd.functional.jacobian(solve, h). They take one solve for "
                "each row."
            ) from error
        raise


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)
