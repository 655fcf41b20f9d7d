"""Ranks that hold different batches of one problem, as under DistributedDataParallel."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from bilevel.failure import callers_level
from bilevel.model_loss import ModelLoss
from bilevel.protocols import InnerDerivatives, OuterDerivatives, Tree
from bilevel.tree import tree_map
from bilevel_torch.backend import TorchBackend
from bilevel_torch.space import TorchSpace, leaves


class DataParallel(TorchBackend):
    """The torch backend on several ranks, each with its own batches: the hypergradient of all data, on every rank.

    Hand it over as ``backend=``, on all ranks alike, with params and hparams that are equal on all of them:

        backend = bilevel_torch.DataParallel(inner_samples=len(x), outer_samples=len(x_val))
        bilevel_torch.backward(inner_loss, outer_loss, ddp.module.parameters(), hparams, backend=backend)

    Each loss is that of the rank's own batch, a mean over its samples (a penalty in it is not divided). The problem
    solved is that of the means over all samples: every Hessian-vector product is averaged over the ranks, weighted by
    their numbers of samples, in one all-reduce of one flat buffer per dtype. (The mean of the solutions of the ranks'
    own problems would be another answer: a mean of inverses is not the inverse of the mean.) Whatever steers the solver
    is a number that all ranks have agreed on, so that they take the same branches.

    Compute the losses with the bare module, ``ddp.module``: DDP reduces in ``loss.backward()`` alone, not in the
    products that are needed here, and its wrapper, called in between, may stop reducing in your training step
    (``static_graph=True``). BatchNorm in train mode sees a rank's own batch; for the result of one process use eval
    mode, or SyncBatchNorm.

    Args:
        inner_samples: how many samples this rank's inner loss is the mean of; None: as many on every rank.
        outer_samples: the same of its outer loss.
        group: the process group; None: the default one.

    Raises:
        ValueError: if there is no process group, or a count is negative.
    """

    def __init__(
        self, *, inner_samples: float | None = None, outer_samples: float | None = None, group: Any = None
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("DataParallel: there is no process group: call torch.distributed.init_process_group().")
        for name, samples in (("inner_samples", inner_samples), ("outer_samples", outer_samples)):
            if samples is not None and not samples >= 0:
                raise ValueError(f"DataParallel.{name}: expected a number >= 0, got {samples!r}.")
        super().__init__(AgreedSpace(group=group))
        self.samples = (inner_samples, outer_samples)
        self.group = group
        self._known_shares: tuple[float, ...] | None = None

    def _shares(self, device: torch.device) -> tuple[float, ...]:
        """Return this rank's shares of the inner and the outer samples; asks the other ranks once."""
        if self._known_shares is None:
            counts = torch.tensor([1.0 if n is None else float(n) for n in self.samples], device=device)
            totals = self._sum([counts])[0]
            if not (totals > 0).all():
                raise ValueError("DataParallel: no rank has any samples.")
            self._known_shares = tuple((counts.double() / totals.double()).tolist())
        return self._known_shares

    @override
    def inner_of(self, value: Any, params: Any, hparams: Any, role: str = "inner") -> InnerDerivatives:
        return self._joined(super().inner_of(value, params, hparams, role), hparams)

    @override
    def gauss_newton(self, inner: ModelLoss, params: Any, hparams: Any, args: tuple[Any, ...]) -> InnerDerivatives:
        return self._joined(super().gauss_newton(inner, params, hparams, args), hparams)

    @override
    def jacobian(self, *args: Any, **options: Any) -> InnerDerivatives:
        raise TypeError("DataParallel: fixed points and roots of several ranks' data are not supported.")

    @override
    def outer_of(
        self, value: Any, params: Any, hparams: Any, role: str, retain_graph: bool = False
    ) -> OuterDerivatives:
        own = super().outer_of(value, params, hparams, role, retain_graph)
        share = self._shares(own.value.device)[0 if role.startswith("inner") else 1]
        return OuterDerivatives(*self._mean((own.value, own.grad_params), share, own.grad_hparams, hparams))

    def _joined(self, own: InnerDerivatives, hparams: Any) -> InnerDerivatives:
        share, cross_jvp = self._shares(leaves(own.grad)[0].device)[0], own.cross_jvp
        return InnerDerivatives(
            grad=self._mean((own.grad,), share)[0],
            hvp=lambda v: self._mean((own.hvp(v),), share)[0],
            cross_vjp=lambda v: self._mean((), share, own.cross_vjp(v), hparams)[0],
            cross_jvp=None if cross_jvp is None else lambda u: self._mean((cross_jvp(u),), share)[0],
        )

    def _mean(self, trees: tuple[Any, ...], share: float, by_hparams: Tree | None = None, like: Any = ()) -> list[Any]:
        """Return the trees' weighted means over the ranks, and that of a derivative by ``like``, the hparams.

        That is None where a rank's loss does not depend on them: then it counts as zero, and is None again if it is on
        all ranks.
        """
        counted = [*trees, self.space.zeros_like(like) if by_hparams is None else by_hparams]
        # Without data, a loss may be nan.
        scaled = tree_map(lambda t: t * share if share else torch.zeros_like(t), counted)
        influence = torch.full_like(leaves(scaled)[0].flatten()[:1], float(by_hparams is not None))
        *means, ranks = self._sum([*leaves(scaled), influence])
        it = iter(means)
        result = tree_map(lambda _: next(it), counted)
        if leaves(like) and not ranks.any():
            result[-1] = None
        return result

    def _sum(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return sums over the ranks, by one all-reduce per dtype: hundreds of small ones would cost a hundredfold."""
        sums: list[Any] = [None] * len(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat, group=self.group)
            for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
                sums[i] = part.reshape(tensors[i].shape)
        return sums


def this_process() -> TorchBackend:
    """Return the backend of one process; warn if there are others."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"This process is one of {dist.get_world_size()} ranks, and the hypergradient is that of its own batches. "
            "For that of all ranks' data, on all ranks, pass backend=bilevel_torch.DataParallel(inner_samples=..., "
            "outer_samples=...); if it is meant so, backend=bilevel_torch.TorchBackend().",
            stacklevel=callers_level(),
        )
    return TorchBackend()


@dataclass(frozen=True)
class AgreedSpace(TorchSpace):
    """Vectors that are equal on all ranks, and numbers of them that are equal to the last bit.

    All-reduced products are, but machines of different kinds may round a dot of them differently; then a rank could
    stop a step before the others, which would wait for it for ever.
    """

    group: Any = None

    def dot(self, x: Any, y: Any) -> torch.Tensor:
        return self._agree(super().dot(x, y))

    def project(self, stack: Any, x: Any) -> torch.Tensor:
        return self._agree(super().project(stack, x))

    def max_abs(self, x: Any) -> torch.Tensor:
        return self._agree(super().max_abs(x))

    def isfinite(self, x: Any) -> torch.Tensor:
        return self._agree(super().isfinite(x).to(torch.uint8)).bool()

    def on_host(self, function: Any, *arrays: torch.Tensor) -> torch.Tensor:
        return self._agree(super().on_host(function, *arrays))

    def _agree(self, t: torch.Tensor) -> torch.Tensor:
        """Return the first rank's."""
        dist.broadcast(t, group=self.group, group_src=0)
        return t
