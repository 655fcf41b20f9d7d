"""Hypergradients for training loops, by gradients only."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bilevel.convergence import NUMBERS, OnFailure, check_on_failure
from bilevel.dependence import warn_of_dependence
from bilevel.errors import SolverError, SolverWarning
from bilevel.linearization import Dependence
from bilevel.messages import callers_level
from bilevel.options import check_int, check_real
from bilevel.results import Hypergradient, SolverInfo, Status
from bilevel.spaces.tree import leaves, leaves_with_paths, with_leaves
from bilevel.validation import check_trees
from bilevel_torch.autograd import check_distinct
from bilevel_torch.backend import TorchBackend
from bilevel_torch.first_order.adaptation import check_adaptive, inverse_roots
from bilevel_torch.first_order.evaluation import Evaluation, Loss
from bilevel_torch.first_order.vectors import Tensors, dot, norm, wide
from bilevel_torch.placement import add_to_grad
from bilevel_torch.shards import is_dtensor
from bilevel_torch.trees import TensorTree, tree_of

STEP = 2.0  # of the central differences, as in bilevel.problems.central_differences
GROWTH = 10.0  # residual against the right-hand side, at most
Losses = Loss | Sequence[Loss]
Optionals = list[torch.Tensor | None]


class FirstOrder:
    """Hypergradients by gradients only, for training loops without second derivatives.

    Products with second derivatives are central differences of gradients of the module, whose weights are exchanged
    meanwhile. So it works under ``torch.compile``, flash attention, autocast, activation checkpoints and custom
    kernels. With d = r v / ‖v‖, a step computes

        ∂²L/∂w² v     ≈ ‖v‖ / 2r · (∂L/∂w(w + d) − ∂L/∂w(w − d))
        (∂²L/∂λ∂w)ᵀ v ≈ ‖v‖ / 2r · (∂L/∂λ(w + d) − ∂L/∂λ(w − d))

    from the same two gradients of L. There are two ways to choose v:

    - With an ``optimizer``, v is tracked over the calls: each of ``steps`` steps moves v along ∂²L/∂w² v − ∂F/∂w, on
      the present batches. The weights w ∓ d are the auxiliary weights of penalty methods, which minimize L ± δF
      (F²SA, Kwon et al., ICML 2023; central: F²SA-2, Chen et al., arXiv 2509.02937). They follow w here, so that r does
      not depend on the training. The order of the updates is as in SOBA (Dagréou et al., NeurIPS 2022). A call takes
      1 + 2 ``steps`` gradients, and two more the first time. The optimizer's ``weight_decay`` is the damping.
    - Without, v is a multiple of ∂F/∂w (Luketina et al., ICML 2016), or of P ∂F/∂w with a ``preconditioner`` (SAMA,
      Choe et al., NeurIPS 2023). P = 1/(√v̂ + eps + δ), by the second moments v̂ of Adam. δ is a tenth of the root mean
      square of √v̂, for weights that have received few gradients. A call takes one gradient of F and two derivatives of
      L by λ. They need no backward pass through the module if λ enters after it. The multiple is measured in the first
      call, with two more gradients. Only the size of the result depends on it, unless F also depends on λ directly.

    Differences include all that depends on w, so ``detach()`` inside of the losses has no effect on them.

    The object has state: save its `state_dict` with your checkpoints.

    Args:
        module: the module that the losses run. Its parameters that require gradients, without hparams, are w.
        hparams: λ, leaf tensors that require gradients: a tensor, a list, a dict, or an iterable such as
            ``net.named_parameters()``.
        optimizer: a function from a list of tensors to an optimizer of `torch.optim`, for v. For example,
            ``partial(torch.optim.SGD, lr=0.1)``. Its step must be stable for the curvature of L: with SGD, take the
            learning rate of the training with SGD.
        steps: the number of steps of the optimizer in each call, >= 1.
        preconditioner: the Adam, AdamW, NAdam or RAdam that trains the module. Only without an ``optimizer``: steps
            of a tracked v that were scaled by P diverged on a linear model and on a transformer.
        perturbation: r = ‖d‖ > 0. "auto": 2 eps^(1/3) max(1, rms of w), where eps is of the coarsest dtype in which the
            first inner loss was computed: 0.01 in float32, 0.3 under autocast in bfloat16.

    Raises:
        TypeError, ValueError: for invalid arguments; the message names the argument.

    >>> import torch, bilevel_torch
    >>> net, decay = torch.nn.Linear(1, 1, bias=False), torch.tensor([0.5], requires_grad=True)
    >>> _ = torch.nn.init.ones_(net.weight)
    >>> inner = lambda: ((net.weight - 1.5) ** 2 + decay * net.weight**2).sum()  # its minimum is at 1
    >>> outer = lambda: ((net.weight - 2) ** 2).sum()
    >>> first_order = bilevel_torch.FirstOrder(net, decay, optimizer=lambda v: torch.optim.SGD(v, lr=0.1))
    >>> hg = first_order.backward(inner, outer)
    >>> decay.grad.round(decimals=2)
    tensor([1.3300])
    """

    def __init__(
        self,
        module: torch.nn.Module,
        hparams: TensorTree,
        *,
        optimizer: Callable[[Tensors], torch.optim.Optimizer] | None = None,
        steps: int = 1,
        preconditioner: torch.optim.Optimizer | None = None,
        perturbation: float | str = "auto",
    ) -> None:
        self.steps, self.perturbation = steps, perturbation
        check_int(self, "steps", least=1)
        check_real(self, "perturbation", above=0, auto=True)
        self._preconditioner = preconditioner if check_adaptive(preconditioner) else None
        if optimizer is not None and preconditioner is not None:
            raise ValueError("FirstOrder: pass either an optimizer, to track v, or a preconditioner.")
        if optimizer is None and steps != 1:
            raise ValueError("FirstOrder.steps: only a tracked v takes steps. Pass an optimizer, or leave steps out.")
        self._hparams = tree_of("hparams", hparams)
        _check_hparams(TorchBackend(), self._hparams)
        self._params = _trained(module, {id(t) for t in leaves(self._hparams)})
        self._evaluation = Evaluation(module, self._params, leaves(self._hparams))
        self._v = [torch.zeros_like(p, dtype=wide(p), requires_grad=False) for p in self._params] if optimizer else []
        self._optimizer = None if optimizer is None else _made(optimizer, self._v)
        self._multiple: torch.Tensor | None = None  # of the first v
        self._eps = 0.0  # unknown before the first call

    def backward(
        self, inner: Losses, outer: Losses, *, accumulate: bool = True, on_failure: OnFailure = "warn"
    ) -> Hypergradient[Any, Any]:
        """Add the hypergradient to the ``.grad`` of hparams.

        Weights, gradients and buffers of the module are as before, to the same bits. The random state moves on.

        Args:
            inner: a function without arguments that runs the module on the present batch and returns L. Or a list of
                functions, one for each micro-batch, whose mean is L. Compute λ's part inside of it, from hparams.
            outer: the same for F.
            accumulate: True: add to what is in ``.grad``. False: replace it.
            on_failure: "warn", "raise" or "ignore", if v grows. "warn" raises if the result is not finite.

        Returns:
            A `bilevel.Hypergradient`. ``adjoint`` is v, a list of tensors. ``info.residual_norm`` is
            ‖∂²L/∂w² v − ∂F/∂w‖ on the present batches, and nan without an ``optimizer``.

        Raises:
            TypeError, ValueError: if a loss is no scalar with a graph, does not depend on its arguments, or differs
                when it is computed again (tested in the first call).
            SolverError: if the result is not finite, or v grows with ``on_failure="raise"``.

        Warns:
            SolverWarning: if v grows.
            DependenceWarning: in the first call, if neither loss uses a tensor of hparams.
        """
        check_on_failure(on_failure)
        inners, outers = _sequence("inner", inner), _sequence("outer", outer)
        with self._evaluation.isolated():
            if not self._eps:
                self._eps = self._evaluation.coarsest_eps(inners)
            hg = self._hypergradient(inners, outers)
        self._report(hg.info, on_failure)
        add_to_grad(self._hparams, hg.grad, accumulate)
        return hg

    def state_dict(self) -> dict[str, Any]:
        """Return v, the state of its optimizer, and the measured numbers. A resumed run has the same bits."""
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        return {"adjoint": self._v, "optimizer": optimizer, "multiple": self._multiple, "eps": self._eps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict` of an object with the same arguments.

        Raise a ValueError if it belongs to another module, or if only one of the objects has an optimizer.
        """
        shapes, own = ([tuple(t.shape) for t in v] for v in (state_dict["adjoint"], self._v))
        if shapes != own:
            raise ValueError(
                f"state_dict: its v has {len(shapes)} tensors, and this FirstOrder has {len(own)}, or their shapes "
                "differ. Construct it with the same module and optimizer, and the same frozen parameters."
            )
        with torch.no_grad():
            for v, saved in zip(self._v, state_dict["adjoint"], strict=True):
                v.copy_(saved)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state_dict["optimizer"])
        multiple = state_dict["multiple"]
        self._multiple = None if multiple is None else multiple.to(self._params[0].device, copy=True)
        self._eps = state_dict["eps"]

    def _hypergradient(self, inner: list[Loss], outer: list[Loss]) -> Hypergradient[Any, Any]:
        at = self._evaluation.gradients("outer", outer)
        value, direct, c = at.value, at.hparams, self._filled("outer", at.params)
        rhs_norm = norm(c)
        multiple = self._start(inner, c) if self._multiple is None else self._multiple
        if self._optimizer is None:
            v = [multiple * x for x in self._preconditioned(c)]
            del at, c  # which are as large as the module
            cross, residual = self._cross(inner, v), torch.full_like(multiple, float("nan"))
        else:
            v, (cross, residual) = self._v, self._track(inner, c, self._optimizer)
        grad = self._combined(direct, cross)
        if self._multiple is None:
            self._warn_of_unused([a is not None or b is not None for a, b in zip(direct, cross, strict=True)])
        finite = torch.stack([rhs_norm.isfinite(), *[g.isfinite().all() for g in grad]]).all()
        status = torch.where(residual > GROWTH * rhs_norm, int(Status.DIVERGED), int(Status.CONVERGED))
        status = torch.where(finite, status, int(Status.NON_FINITE))
        numbers: list[float] = torch.stack([x.double() for x in (residual, rhs_norm, status)]).tolist()
        info = SolverInfo(self.steps if self._optimizer else 0, numbers[0], numbers[1], Status(int(numbers[2])))
        if info.status != Status.NON_FINITE:  # else the next call starts again
            self._multiple = multiple
        return Hypergradient(with_leaves(self._hparams, grad), value, v, self._params, info)

    def _start(self, inner: list[Loss], c: Tensors) -> torch.Tensor:
        """Return the multiple of P c with the smallest residual. A tracked v starts there."""
        direction = self._preconditioned(c)
        products, _ = self._products(inner, direction)
        square = dot(products, products)
        multiple = torch.where(square > 0, dot(c, products).abs() / torch.where(square > 0, square, 1.0), 0.0)
        if self._optimizer is not None:
            for v, x in zip(self._v, direction, strict=True):
                v.copy_(multiple * x)
        return multiple

    def _track(self, inner: list[Loss], c: Tensors, optimizer: torch.optim.Optimizer) -> tuple[Optionals, torch.Tensor]:
        """Move v. Return the cross product with the last v before its step, and the norm of its residual."""
        cross, residual = [], norm(c)
        for _ in range(self.steps):
            products, cross = self._products(inner, self._v)
            residuals = [x - y for x, y in zip(products, c, strict=True)]
            residual = norm(residuals)
            if not bool(residual.isfinite()):  # the step would lose v
                break
            for v, gradient in zip(self._v, residuals, strict=True):
                v.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        return cross, residual

    def _preconditioned(self, x: Tensors) -> Tensors:
        if self._preconditioner is None:
            return x
        return [a * b for a, b in zip(x, inverse_roots(self._preconditioner, self._params), strict=True)]

    def _products(self, inner: list[Loss], v: Tensors) -> tuple[Tensors, Optionals]:
        """Return (∂²L/∂w²) v and (∂²L/∂λ∂w)ᵀ v."""
        step, scale = self._step(v)
        ends = self._evaluation.difference(inner, v, step)
        return [scale * x for x in self._filled("inner", ends.params)], _scaled(scale, ends.hparams)

    def _cross(self, inner: list[Loss], v: Tensors) -> Optionals:
        """Return (∂²L/∂λ∂w)ᵀ v."""
        if any(map(is_dtensor, self._params)):  # FSDP2 needs a whole backward pass after each forward
            return self._products(inner, v)[1]
        step, scale = self._step(v)
        return _scaled(scale, self._evaluation.difference_by_hparams(inner, v, step))

    def _step(self, v: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Return r / ‖v‖ and ‖v‖ / 2r."""
        size = norm(v)
        size = torch.where(size > 0, size, 1.0)
        radius: Any = self.perturbation
        if isinstance(radius, str):
            rms = norm(self._params) / sum(p.numel() for p in self._params) ** 0.5
            radius = STEP * self._eps ** (1 / 3) * rms.clip(min=1.0)
        return radius / size, size / (2 * radius)

    def _filled(self, name: str, grads: Optionals) -> Tensors:
        """Return gradients by params, with zeros for None."""
        if all(g is None for g in grads):
            raise ValueError(
                f"{name} does not depend on the trained parameters of the module. Run the module inside it."
            )
        pairs = zip(grads, self._params, strict=True)
        return [torch.zeros_like(p, dtype=wide(p)) if g is None else g.to(wide(p)) for g, p in pairs]

    def _combined(self, direct: Optionals, cross: Optionals) -> Tensors:
        """Return ∂F/∂λ − (∂²L/∂λ∂w)ᵀ v."""
        pairs = list(zip(direct, cross, leaves(self._hparams), strict=True))
        if all(a is None and b is None for a, b, _ in pairs):
            raise ValueError(
                "Neither inner nor outer depends on hparams. Compute them from hparams inside the functions: a tensor "
                "that is computed before, detached or converted to a number has no derivative."
            )
        zeros = [torch.zeros_like(t, requires_grad=False) for *_, t in pairs]
        return [
            (z if a is None else a) - (z if b is None else b).to(z.dtype)
            for (a, b, _), z in zip(pairs, zeros, strict=True)
        ]

    def _warn_of_unused(self, used: list[bool]) -> None:
        """Warn about hparams that neither loss uses."""
        known = Dependence([True] * len(self._params), used)
        warn_of_dependence(TorchBackend(), self._params, self._hparams, known, known)

    def _report(self, info: SolverInfo, on_failure: OnFailure) -> None:
        if info.status == Status.CONVERGED or on_failure == "ignore":
            return
        if info.status == Status.NON_FINITE:
            raise SolverError(
                "FirstOrder: the hypergradient is not finite, so .grad is as before. Check the losses, and lower the "
                'learning rate of the optimizer for v if v has grown. on_failure="ignore" returns the nan.'
            )
        text = (
            "FirstOrder: v grows, because its optimizer's steps are too large or the curvature of L is negative. Lower "
            "its learning rate, or give it a weight_decay: the damping."
        )
        if on_failure == "raise":
            raise SolverError(f"{text} The residual is {info.residual_norm:.2g} of {info.rhs_norm:.2g}.")
        warnings.warn(SolverWarning(f"{text} {NUMBERS}"), stacklevel=callers_level())


def _trained(module: torch.nn.Module, without: set[int]) -> Tensors:
    """Return the parameters of a module that require gradients."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"module: expected the torch.nn.Module that the losses run, got {type(module).__name__}. For several "
            "modules, pass torch.nn.ModuleList(modules)."
        )
    params: Tensors = [p for p in module.parameters() if p.requires_grad and id(p) not in without]
    if not params:
        raise ValueError("module: it has no parameters that require gradients, apart from hparams. Unfreeze some.")
    return params


def _made(make: Callable[[Tensors], torch.optim.Optimizer], v: Tensors) -> torch.optim.Optimizer:
    """Return the optimizer of v."""
    made: Any = make(v) if callable(make) else make
    if isinstance(make, torch.optim.Optimizer) or not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            "optimizer: expected a function from a list of tensors to an optimizer of torch.optim, such as "
            f"partial(torch.optim.SGD, lr=0.1), got {make!r:.100}."
        )
    return made


def _check_hparams(backend: TorchBackend, hparams: object) -> None:
    check_trees(backend, {"hparams": hparams}, {})
    check_distinct((), hparams)
    for path, t in leaves_with_paths(hparams, "hparams"):
        if not t.requires_grad:
            raise ValueError(f"{path} does not require a gradient: call requires_grad_() on it.")
        if not t.is_leaf:
            raise ValueError(
                f"{path} is computed from other tensors. Pass these other tensors, and compute it inside inner."
            )


def _sequence(name: str, losses: Losses) -> list[Loss]:
    """Return one or several functions as a list."""
    several: list[Any] = list(losses) if isinstance(losses, Sequence) else [losses]
    for loss in several:
        if not callable(loss):
            hint = " Pass the function that computes it." if isinstance(loss, torch.Tensor) else ""
            raise TypeError(f"{name}: expected a function without arguments, got {type(loss).__name__}.{hint}")
    if not several:
        raise ValueError(f"{name}: the list of functions is empty.")
    return several


def _scaled(scale: torch.Tensor, grads: Optionals) -> Optionals:
    return [None if g is None else scale * g for g in grads]
