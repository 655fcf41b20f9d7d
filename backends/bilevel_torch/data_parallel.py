"""Ranks that hold different batches of one problem, as under DistributedDataParallel."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from typing_extensions import override

from bilevel.convergence import callers_level
from bilevel.problems.model_loss import ModelLoss
from bilevel.protocols import InnerDerivatives, OuterDerivatives, Tree
from bilevel.spaces.tree import leaves, leaves_with_paths, with_leaves
from bilevel_torch.backend import TorchBackend
from bilevel_torch.space import TorchSpace

if dist.is_available():
    # DDP imports this module as it wraps its first network, and its functions then have the process group of the moment
    # as a default, for ever: destroy_process_group() does not end gloo's threads, and one that drops the tensor of a
    # reduction while the interpreter ends aborts the process. Imported before there is a group, they have None.
    import torch.distributed.nn


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
        ValueError: if there is no process group, this process is not in it, or a count is negative; when called, on all
            ranks, if counts are given on some of them only, or params or hparams differ.
    """

    collective = True

    def __init__(
        self, *, inner_samples: float | None = None, outer_samples: float | None = None, group: Any = None
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("DataParallel: there is no process group: call torch.distributed.init_process_group().")
        if dist.get_rank(group) < 0:  # its reductions would do nothing, in silence
            raise ValueError(f"DataParallel: rank {dist.get_rank()} is not in the group; make none there.")
        for name, samples in (("inner_samples", inner_samples), ("outer_samples", outer_samples)):
            if samples is not None and not samples >= 0:
                raise ValueError(f"DataParallel.{name}: expected a number >= 0, got {samples!r}.")
        super().__init__(AgreedSpace(group=group))
        self.samples = (inner_samples, outer_samples)
        self.group = group

    def _shares(self, device: torch.device) -> tuple[float, float]:
        """Return this rank's shares of the inner and the outer samples."""
        counts = [1.0 if n is None else float(n) for n in self.samples]
        unknown = [float(n is None) for n in self.samples]
        totals = self._sum([torch.tensor([*counts, *unknown], dtype=torch.float64, device=device)])[0].tolist()
        for name, total, without in zip(("inner_samples", "outer_samples"), totals[:2], totals[2:], strict=True):
            if without not in (0, dist.get_world_size(self.group)):
                raise ValueError(f"DataParallel.{name}: given on some ranks only; give it on all of them, or on none.")
            if not total > 0:
                raise ValueError(f"DataParallel.{name}: zero on all ranks.")
        return counts[0] / totals[0], counts[1] / totals[1]

    def _check_equal(self, **trees: Tree) -> None:
        """Raise a ValueError on all ranks unless each of these trees is the same on all of them, by layout and sums."""
        named = [[*leaves_with_paths(tree)] for tree in trees.values()]
        layouts = [[(path, t.shape, t.dtype, t.requires_grad) for path, t in part] for part in named]
        sums = [torch.stack([t.detach().sum(dtype=torch.float64) for _, t in part]) for part in named]
        places = [torch.arange(1, len(part) + 1, dtype=part.dtype, device=part.device) for part in sums]
        marks = torch.stack([torch.dot(part, place) for part, place in zip(sums, places, strict=True)])
        marks = torch.cat([marks.new_tensor([crc32(repr(layout).encode()) for layout in layouts]), marks])
        ends = torch.cat([marks, -marks])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        # Those of nan do not differ, and have a status.
        differ = [most > -least for most, least in zip(*ends.view(2, -1).tolist(), strict=True)]
        for name, layout, values in zip(trees, differ, differ[len(trees) :], strict=False):
            if layout:
                raise ValueError(
                    f"DataParallel: {name} are other tensors on some ranks, by their order, names, shapes, dtypes or "
                    "requires_grad. Of what belongs to a rank's own examples, such as their weights, hand over that of "
                    "all examples on every rank, and use its part."
                )
            if values:
                raise ValueError(
                    f"DataParallel: {name} are not the same on all ranks. Seed all ranks alike before they are made, "
                    "or broadcast them from one, and move them by equal optimizers."
                )

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
        if not role.startswith("inner"):
            self._check_equal(params=params, hparams=hparams)
        own = super().outer_of(value, params, hparams, role, retain_graph)
        share = self._shares(own.value.device)[0 if role.startswith("inner") else 1]
        mean, grad_params = self._mean((own.value, own.grad_params), share)
        return OuterDerivatives(mean, grad_params, self._mean_or_none(own.grad_hparams, hparams, share))

    def _joined(self, own: InnerDerivatives, hparams: Any) -> InnerDerivatives:
        share, cross_jvp = self._shares(leaves(own.grad)[0].device)[0], own.cross_jvp
        return InnerDerivatives(
            grad=self._mean(own.grad, share),
            hvp=lambda v: self._mean(own.hvp(v), share),
            cross_vjp=lambda v: self._mean_or_none(own.cross_vjp(v), hparams, share),
            cross_jvp=None if cross_jvp is None else lambda u: self._mean(cross_jvp(u), share),
        )

    def _mean(self, tree: Tree, share: float) -> Tree:
        """Return the weighted mean over the ranks."""
        # Without data, a loss may be nan.
        return with_leaves(tree, self._sum([t * share if share else torch.zeros_like(t) for t in leaves(tree)]))

    def _mean_or_none(self, tree: Tree | None, like: Tree, share: float) -> Tree | None:
        """Return the mean of what is None, and counts as zero, where a rank's loss does not depend on hparams.

        None if it is on all ranks.
        """
        if not leaves(like):
            return tree
        own = self.space.zeros_like(like) if tree is None else tree
        influence = leaves(like)[0].new_full((), float(tree is not None))
        mean = self._mean(own, share), self._sum([influence])[0]
        return mean[0] if mean[1] > 0 else None

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
