"""The derivatives of a minimizer, as rules for autograd and torch.func."""
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from bilevel.convergence import OnFailure, report
from bilevel.dependence import warn_of_dependence
from bilevel.hypergradient import combine
from bilevel.linear_solvers import LinearSolver
from bilevel.linearization import Dependence, LinearizedMap
from bilevel.methods.implicit import Implicit, pull_back
from bilevel.operators.lanczos import spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo
from bilevel.spaces.tree import leaves, tree_map, with_leaves
from bilevel.trainings import Arguments, check_training_result, training_name, tuples_noted
from bilevel.validation import leaf_names
from bilevel_torch.autograd import as_graph_leaves, evaluate, no_grad_no_autocast
from bilevel_torch.backend import TorchBackend
from bilevel_torch.trees import fill, prune

Tensors = Sequence[torch.Tensor]
CHANGED = (
    "implicit_minimizer: params or arguments of a training have changed in place before its backward pass. If one "
    "module is trained several times before it, for example for each fold, return copies: "
    "{name: p.detach().clone() for name, p in net.named_parameters()}."
)


@dataclass
class Training:
    """A call of a training. All the tensors in the arguments are inputs of the rules below.

    ``found``, ``frozen`` and ``aux`` are results: the tree of params, the flags of its frozen parameters, and the
    auxiliary results of the runs. Under vmap, there are several runs.
    """

    train: Callable[..., Any]
    inner: Callable[..., torch.Tensor]
    solver: LinearSolver[Any]
    on_failure: OnFailure
    has_aux: bool
    given: Arguments
    found: Any = None
    frozen: Sequence[bool] = ()
    aux: list[Any] = field(default_factory=list)
    backend: ClassVar[TorchBackend] = TorchBackend()

    def __call__(self) -> tuple[Any, Any]:
        """Run the training. Return params, which PyTorch can differentiate, and the auxiliary result."""
        out = _Minimum.apply(self, *filter(_is_tensor, leaves(self.given)))
        return with_leaves(self.found, out), self.aux.pop()

    def run(self, tensors: Tensors) -> Tensors:
        """Run the training on detached tensors. Return the leaves of params."""
        given = self._arguments(t.detach() if t.requires_grad else t for t in tensors)
        with torch.enable_grad():
            result = self.train(given.hparams, *given.args, **given.shared, **given.own)
        params, aux = check_training_result(self.backend, training_name(self.train), result, self.has_aux)
        found = leaves(params)
        self.aux.append(tree_map(lambda leaf: leaf.detach() if _is_tensor(leaf) else leaf, aux))
        self.found = tree_map(lambda _: 0, params)
        trained = any(t.requires_grad for t in found)
        self.frozen = [trained and isinstance(t, torch.nn.Parameter) and not t.requires_grad for t in found]
        return tuple(t.detach() for t in found)

    def pull(self, varied: Sequence[bool], grads: Tensors, params: Tensors, tensors: Tensors) -> Tensors:
        """Return the derivatives of F by the varied tensors, from the derivatives by params."""
        with no_grad_no_autocast(params):
            at, A, moving = self._linearize(varied, params, tensors)
            cotangent = prune(with_leaves(self.found, grads), self.frozen)
            pulled = pull_back(self.backend, self.solver, A, at, cotangent, None)
            value: Any = torch.zeros(())  # F is unknown here
            hg = combine(self.backend, value, None, pulled, moving)
            self._report(hg.info, A, varied, pulled.dependence)
            return tuple(hg.grad)

    def push(self, varied: Sequence[bool], changes: Tensors, params: Tensors, tensors: Tensors) -> Tensors:
        """Return the derivatives of params along changes of the varied tensors: −[∂²L/∂w²]⁻¹ (∂²L/∂λ∂w) u."""
        with no_grad_no_autocast(params):
            at, A, moving = self._linearize(varied, params, tensors)
            if at.jvp_hparams is None or at.dependence is None or not any((used := at.dependence()).hparams):
                raise ValueError(f"∂L/∂w does not depend on {leaf_names(self.backend, 'hparams', moving)}.")
            change, info = self.solver.solve(self.solver.init(A), A, at.jvp_hparams(list(changes)), None)
            self._report(info, A, varied, used)
            found = fill(with_leaves(self.found, map(torch.zeros_like, params)), A.space.scale(-1.0, change))
            return tuple(leaves(found))

    def _linearize(
        self, varied: Sequence[bool], params: Tensors, tensors: Tensors
    ) -> tuple[LinearizedMap[Any, list[torch.Tensor]], LinearOperator[Any], list[torch.Tensor]]:
        copies = [t.detach().requires_grad_() if moves else t for t, moves in zip(tensors, varied, strict=True)]
        given = self._arguments(copies)
        moving = [t for t, moves in zip(copies, varied, strict=True) if moves]
        whole = with_leaves(self.found, [p.detach() for p in params])
        w, _ = as_graph_leaves(prune(whole, self.frozen), ())
        loss = partial(self.inner, **given.shared)
        with tuples_noted(training_name(self.train), whole):
            value = evaluate(loss, fill(whole, w), given.hparams, *given.args)
        at = self.backend.inner_of(value, w, moving)
        return at, LinearOperator(self.backend.space(w), at.vjp_params), moving

    def _report(
        self, info: SolverInfo, A: LinearOperator[Any], varied: Sequence[bool], used: Dependence | None
    ) -> None:
        if used is not None:  # it is about the tensors that move; the others count as used
            moving, hparams = iter(used.hparams), self.given.hparams
            flags = iter([next(moving) if moves else True for moves in varied])
            used = used._replace(hparams=[next(flags) if _is_tensor(leaf) else True for leaf in leaves(hparams)])
            warn_of_dependence(self.backend, A.space.like, hparams, None, used)
        report(self.backend, info, Implicit(self.solver), self.on_failure, curvature=lambda: spectrum(A))

    def _arguments(self, tensors: Iterable[torch.Tensor]) -> Arguments:
        it = iter(tensors)
        return tree_map(lambda leaf: next(it) if _is_tensor(leaf) else leaf, self.given)


@dataclass(frozen=True)
class _Moved:
    """A training, and which of its tensors move. PyTorch passes such an object through its transforms unchanged."""

    training: Training
    varied: Sequence[bool]


class _Rule(torch.autograd.Function):
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


class _Minimum(_Rule):
    @staticmethod
    def forward(training: Training, *tensors: torch.Tensor) -> Any:
        return training.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        training, *tensors = inputs
        varied = ctx.needs_input_grad[1:]
        ctx.moved, ctx.count = _Moved(training, varied), len(output)
        # Only these must not change before the derivative. PyTorch raises an error if they do.
        ctx.save_for_backward(*output, *(t for t, moves in zip(tensors, varied, strict=True) if moves))
        ctx.others = [None if moves else t for t, moves in zip(tensors, varied, strict=True)]
        ctx.save_for_forward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:  # PyTorch's error about a change in place
            error.add_note(CHANGED)
            raise
        params, moving = saved[: ctx.count], iter(saved[ctx.count :])
        tensors = [next(moving) if t is None else t for t in ctx.others]
        pulled = iter(_Pull.apply(ctx.moved, *grads, *params, *tensors))
        return None, *(next(pulled) if moves else None for moves in ctx.moved.varied)

    @staticmethod
    def jvp(ctx: Any, *changes: torch.Tensor | None) -> Any:
        moved = _Moved(ctx.moved.training, [change is not None for change in changes[1:]])
        return _Push.apply(moved, *(change for change in changes if change is not None), *ctx.saved_tensors)

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        aux = args[0].aux
        first = len(aux)
        result = super().vmap(info, in_dims, *args)
        aux[first:] = [aux[first:]]
        return result


class _Pull(_Rule):
    @staticmethod
    def forward(moved: _Moved, *tensors: torch.Tensor) -> Any:
        count = len(moved.training.frozen)
        grads, params, given = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        with _vectorized_named():
            return moved.training.pull(moved.varied, grads, params, given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "implicit_minimizer has only a first derivative. Do not differentiate it twice with create_graph=True, or "
            "use it in an inner loss. bilevel_jax.implicit_minimizer has higher derivatives."
        )

    jvp = backward


class _Push(_Rule):
    @staticmethod
    def forward(moved: _Moved, *tensors: torch.Tensor) -> Any:
        first, count = sum(moved.varied), len(moved.training.frozen)
        params, given = tensors[first : first + count], tensors[first + count :]
        with _vectorized_named():
            return moved.training.push(moved.varied, tensors[:first], params, given)

    setup_context = _Pull.setup_context
    backward = jvp = _Pull.backward


@contextmanager
def _vectorized_named() -> Iterator[None]:
    """Replace PyTorch's errors about the older vmap, for which a function cannot have a rule."""
    try:
        yield
    except RuntimeError as error:
        if "Batching rule not implemented" in str(error) or "inside of vmap" in str(error):
            raise RuntimeError(
                "implicit_minimizer has no vectorized Jacobian (vectorize=True, is_grads_batched=True). Call "
                "torch.func.jacrev(solve)(h), or torch.autograd.functional.jacobian(solve, h). They take one solve for "
                "each row."
            ) from error
        raise


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)
