"""Hypergradients of ranks with different batches of one problem, as under DistributedDataParallel."""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any, Concatenate
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from typing_extensions import override

from bilevel.backend import Backend, Data, R, Rest, stacked
from bilevel.linearization import LinearizedMap, OuterDerivatives
from bilevel.messages import callers_level
from bilevel.problems.model_loss import ModelLoss
from bilevel.spaces.array import Args, H, P, V
from bilevel.spaces.tree import leaves, leaves_with_paths, with_leaves
from bilevel_torch.backend import TorchBackend
from bilevel_torch.roll_call import named, named_ranks, odd_ranks
from bilevel_torch.shards import is_dtensor, layout_of, local
from bilevel_torch.space import TorchSpace

if dist.is_available():
    # DDP imports this module when it wraps its first network. Then its functions keep the current process group as a
    # default, and destroy_process_group() does not end gloo's threads. A thread that frees the tensor of a reduction
    # while the interpreter ends aborts the process. If the import comes before a group exists, the default is None.
    import torch.distributed.nn


ONE_RANK = TorchBackend()


class DataParallel(TorchBackend):
    """The torch backend on several ranks with different batches: the hypergradient of all data, on every rank.

    Pass it as ``backend=`` on all ranks, with params and hparams that are equal on all ranks:

        backend = bilevel_torch.DataParallel(inner_samples=len(x), outer_samples=len(x_val))
        bilevel_torch.backward(inner_loss, outer_loss, ddp.module.parameters(), hparams, backend=backend)

    Each loss is a mean over the samples of the rank's batch (a penalty in it is not divided). The backend solves the
    problem of the means over all samples. It averages every Hessian-vector product over the ranks, weighted by their
    numbers of samples, in one all-reduce of one flat buffer per dtype. (The mean of the solutions of each rank's
    problem would differ: a mean of inverses is not the inverse of the mean.) All ranks receive the same scalars, so
    their solvers take the same branches.

    With `bilevel.MicroBatches`, a rank first computes the mean over its own micro-batches. So there is still one
    all-reduce per product, and ranks may have different numbers of micro-batches. ``inner_samples`` and
    ``outer_samples`` are the totals of the rank.

    Compute the losses with the unwrapped module, ``ddp.module``. DDP reduces only in ``loss.backward()``, not in these
    products, and a call of its wrapper can stop the reduction in your training step (``static_graph=True``). In train
    mode, BatchNorm uses the rank's batch. To get the result of one process, use eval mode or SyncBatchNorm.

    Args:
        inner_samples: number of samples in the mean of this rank's inner loss; None: the same number on every rank.
        outer_samples: number of samples in the mean of this rank's outer loss; None: the same number on every rank.
        group: the process group; None: the default group.

    Raises:
        ValueError: if there is no process group, this process is not in it, or a count is negative. When called, on all
            ranks, if only some ranks give counts, or params or hparams differ.
    """

    requires_all_ranks = True

    @property
    def label(self) -> str:
        """The name of the class, for errors."""
        return type(self).__name__

    def __init__(
        self, *, inner_samples: float | None = None, outer_samples: float | None = None, group: Any = None
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"{self.label}: there is no process group: call torch.distributed.init_process_group().")
        if dist.get_rank(group) < 0:  # its reductions would do nothing, without an error
            raise ValueError(f"{self.label}: rank {dist.get_rank()} is not in the group. Make no {self.label} there.")
        for name, samples in (("inner_samples", inner_samples), ("outer_samples", outer_samples)):
            if samples is not None and (not isinstance(samples, Real) or not samples >= 0):
                raise ValueError(f"{self.label}.{name}: expected a number >= 0, got {samples!r}.")
        super().__init__()
        self.samples = (inner_samples, outer_samples)
        self.group = group

    def _shares(self, device: torch.device) -> tuple[float, float]:
        """Return this rank's shares of the inner and the outer samples."""
        counts = [1.0 if n is None else float(n) for n in self.samples]
        unknown = [float(n is None) for n in self.samples]
        rows = self._gathered(torch.tensor([*counts, *unknown], dtype=torch.float64, device=device))
        totals = [sum(row[i] for row in rows) for i in (0, 1)]
        for i, name in enumerate(("inner_samples", "outer_samples")):
            if odd := odd_ranks([row[2 + i] for row in rows], self.group):
                raise ValueError(
                    f"{self.label}.{name}: only some ranks give it: {named(odd)} and the others differ. Give it on all "
                    "ranks, or on none."
                )
            if not totals[i] > 0:
                raise ValueError(f"{self.label}.{name}: zero on all ranks.")
        return counts[0] / totals[0], counts[1] / totals[1]

    def _share(self, data: Data, device: torch.device) -> float:
        """Return the weight of this rank's values in a sum over the ranks."""
        return self._shares(device)[0 if data == "inner" else 1]

    @override
    def run(self, function: Callable[Concatenate[Backend, Rest], R], *args: Rest.args, **options: Rest.kwargs) -> R:
        with named_ranks(self.label, self.group, self._groups()):
            return super().run(function, *args, **options)

    def _groups(self) -> Iterable[Any]:
        """Return the process groups whose collectives a call may run."""
        return [self.group]

    @override
    def check_settings(self, params: object, *settings: object) -> None:
        """Raise a ValueError on all ranks unless the settings of a call are equal on all ranks."""
        text = re.sub(r"0x[0-9a-f]+", "", repr(settings))  # without addresses
        mark = local(leaves(params)[0]).new_full((1,), crc32(text.encode()), dtype=torch.float64)
        if odd := odd_ranks([row[0] for row in self._gathered(mark)], self.group):
            raise ValueError(
                f"{self.label}: the solver, its options, adjoint0, loss_scale or on_failure differ between the ranks: "
                f"{named(odd)} and the others. This rank has {', '.join(map(repr, settings))}."
            )

    def _check_equal(self, **trees: object) -> None:
        """Raise a ValueError on all ranks unless the layout and the sums of each tree are equal on all ranks."""
        named_leaves = [[*leaves_with_paths(tree)] for tree in trees.values()]
        layouts = [
            [(path, t.shape, t.dtype, t.requires_grad, layout_of(t)) for path, t in part] for part in named_leaves
        ]
        sums = [torch.stack([_sum_of(t) for _, t in part]) for part in named_leaves]
        places = [torch.arange(1, len(part) + 1, dtype=part.dtype, device=part.device) for part in sums]
        marks = torch.stack([torch.dot(part, place) for part, place in zip(sums, places, strict=True)])
        marks = torch.cat([marks.new_tensor([crc32(repr(layout).encode()) for layout in layouts]), marks])
        # Sums that are nan do not count as different: a status reports them.
        odd = [odd_ranks(numbers, self.group) for numbers in zip(*self._gathered(marks), strict=True)]
        for name, layout, values in zip(trees, odd, odd[len(trees) :], strict=False):
            if layout:
                raise ValueError(
                    f"{self.label}: {name} are other tensors on {named(layout)}, by their order, names, shapes, dtypes "
                    "or requires_grad. If a hyperparameter has one entry per example, pass the entries of all examples "
                    "on every rank, and index the part that this rank needs."
                )
            if values:
                raise ValueError(
                    f"{self.label}: {name} are not the same on all ranks: {named(values)} and the others differ. Use "
                    "the same seed on all ranks before they are made, or broadcast them from one rank. Update them by "
                    "equal optimizers."
                )

    def _gathered(self, numbers: torch.Tensor) -> list[list[float]]:
        """Return the numbers of each rank."""
        rows = numbers.new_zeros(dist.get_world_size(self.group), len(numbers))
        rows[dist.get_rank(self.group)] = numbers
        dist.all_reduce(rows, group=self.group)
        return rows.tolist()

    @override
    def located(self, find: Callable[[Backend], str], *losses: torch.Tensor) -> str:
        text = ""
        with suppress(ValueError, RuntimeError):  # the losses of one rank may not depend on all arguments
            text = find(ONE_RANK)
        return self._of_ranks(text)

    def _of_ranks(self, text: str) -> str:
        """Return the texts of all ranks, with the ranks."""
        texts: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(texts, text, group=self.group)
        ranks = dist.get_process_group_ranks(self.group)
        return " ".join(f"On rank {rank}: {said}" for rank, said in zip(ranks, texts, strict=True) if said)

    @override
    def space(self, tree: V) -> TorchSpace[V]:
        return AgreedSpace(tree, self.group)

    @override
    def inner(self, objective: Callable[..., object], params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        return self._averaged(ONE_RANK.inner(objective, params, hparams, args), hparams)

    @override
    def inner_of(
        self,
        value: object,
        params: P,
        hparams: H,
        label: str = "inner",
        trainable: type[torch.Tensor] = torch.Tensor,
    ) -> LinearizedMap[P, H]:
        loss = self._loss(label, value, "inner")
        return self._averaged(self._within(ONE_RANK.inner_of)(loss, params, hparams, label, trainable), hparams)

    @override
    def gauss_newton(self, inner: ModelLoss, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        return self._averaged(ONE_RANK.gauss_newton(inner, params, hparams, args), hparams)

    @override
    def jacobian(self, *args: object, **options: object) -> LinearizedMap[Any, Any]:
        raise TypeError(
            f"{self.label}: fixed points, roots and proximal problems of several ranks' data are not supported."
        )

    @override
    def outer(
        self,
        objective: Callable[..., object],
        params: P,
        hparams: H,
        args: Args,
        *,
        label: str = "outer",
        data: Data = "outer",
    ) -> OuterDerivatives[P, H]:
        def own() -> OuterDerivatives[P, H]:
            return ONE_RANK.outer(objective, params, hparams, args, label=label, data=data)

        return self._averaged_outer(own, params, hparams, data)

    @override
    def outer_of(
        self,
        value: object,
        params: P,
        hparams: H,
        label: str = "outer",
        data: Data = "outer",
        retain_graph: bool = False,
    ) -> OuterDerivatives[P, H]:
        def own() -> OuterDerivatives[P, H]:
            loss = self._loss(label, value, data)
            return self._within(ONE_RANK.outer_of)(loss, params, hparams, label, data, retain_graph)

        return self._averaged_outer(own, params, hparams, data)

    def _loss(self, label: str, value: object, data: Data) -> object:
        """Return the loss of one rank that is differentiated in place of a value."""
        return value

    def _within(self, function: Callable[Rest, R]) -> Callable[Rest, R]:
        """Return a function as it must run for the derivatives of one rank."""
        return function

    def _averaged_outer(
        self, compute: Callable[[], OuterDerivatives[P, H]], params: P, hparams: H, data: Data
    ) -> OuterDerivatives[P, H]:
        """Return the value and the gradients averaged over the ranks. First compare the arguments of the ranks."""
        if data == "outer":
            self._check_equal(params=params, hparams=hparams)
        own = compute()
        share = self._share(data, own.value.device)  # pyright: ignore
        mean, grad_params = self._mean((own.value, own.grad_params), share)
        return OuterDerivatives(mean, grad_params, self._mean_or_none(own.grad_hparams, hparams, share))

    @override
    def outers(self, objective: Any, params: P, hparams: H, args: Args) -> OuterDerivatives[P, H]:
        self._check_equal(params=params, hparams=hparams)
        value, grad_params, grad_hparams, _ = super().outers(objective, params, hparams, args)
        share = self._share("outer", leaves(grad_params)[0].device)
        value, grad_params = self._mean((value, grad_params), share)
        like = stacked(self, [hparams] * len(value))
        return OuterDerivatives(value, grad_params, self._mean_or_none(grad_hparams, like, share))

    @property
    @override
    def by_rows(self) -> TorchBackend:
        return self  # one row after the other: vmap has no collectives

    def _averaged(self, own: LinearizedMap[P, H], hparams: H) -> LinearizedMap[P, H]:
        """Return the map of all ranks' data: values and products averaged over the ranks. ``own`` is of this rank."""
        share = self._share("inner", leaves(own.residual)[0].device)
        jvp_hparams, jvp_params = own.jvp_hparams, own.jvp_params
        return LinearizedMap(
            residual=self._mean(own.residual, share),
            vjp_params=lambda v: self._mean(own.vjp_params(v), share),
            vjp_hparams=lambda v: self._mean_or_none(own.vjp_hparams(v), hparams, share),
            jvp_hparams=None if jvp_hparams is None else lambda u: self._mean(jvp_hparams(u), share),
            jvp_params=None if jvp_params is None else lambda v: self._mean(jvp_params(v), share),
        )

    def _mean(self, tree: V, share: float) -> V:
        """Return the weighted mean over the ranks."""
        # A loss without data may be nan.
        return with_leaves(tree, self._sum([t * share if share else torch.zeros_like(t) for t in leaves(tree)]))

    def _mean_or_none(self, tree: V | None, like: V, share: float) -> V | None:
        """Return the weighted mean over the ranks, where None counts as zero; None if it is None on all ranks."""
        if not leaves(like):
            return tree
        own = self.space(like).zeros() if tree is None else tree
        influence = local(leaves(like)[0]).new_full((), float(tree is not None))
        mean = self._mean(own, share), self._sum([influence])[0]
        return mean[0] if mean[1] > 0 else None

    def _sum(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return sums over the ranks by one all-reduce per dtype. One per tensor can take a hundred times as long."""
        sums: list[Any] = [None] * len(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat, group=self.group)
            for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
                sums[i] = part.reshape(tensors[i].shape)
        return sums


def _sum_of(t: torch.Tensor) -> torch.Tensor:
    """Return the sum of the entries; of a DTensor zero, because ranks have different parts."""
    if is_dtensor(t):
        return local(t).new_zeros((), dtype=torch.float64)
    return t.detach().sum(dtype=torch.float64)


def this_process() -> TorchBackend:
    """Return the backend of one process. Warn if there are other processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"This process is one of {dist.get_world_size()} ranks, and the hypergradient uses only its batches. For "
            "the hypergradient of all ranks' data, pass backend=bilevel_torch.DataParallel(inner_samples=..., "
            "outer_samples=...) on all ranks. To silence this warning, pass backend=bilevel_torch.TorchBackend().",
            stacklevel=callers_level(),
        )
    return TorchBackend()


class AgreedSpace(TorchSpace[V]):
    """Vectors that are equal on all ranks, with scalars that are equal to the last bit.

    All-reduced products are equal, but different machines may round their dot products differently. Then one rank could
    stop a step before the others, and the others would wait without end.
    """

    def __init__(self, like: V, group: Any = None) -> None:
        super().__init__(like)
        self.group = group

    @override
    def dot(self, x: V, y: V) -> torch.Tensor:
        return self._broadcast_from_first(super().dot(x, y))

    @override
    def stack_dot(self, stack: object, x: V) -> torch.Tensor:
        return self._broadcast_from_first(super().stack_dot(stack, x))

    @override
    def gram(self, rows: object, others: object) -> torch.Tensor:
        return self._broadcast_from_first(super().gram(rows, others))

    @override
    def max_abs(self, x: V) -> torch.Tensor:
        return self._broadcast_from_first(super().max_abs(x))

    @override
    def isfinite(self, x: object) -> Any:
        finite: Any = super().isfinite(x)
        return self._broadcast_from_first(finite.to(torch.uint8)).bool()

    @override
    def numpy_callback(self, function: Callable[..., np.ndarray], *arrays: torch.Tensor) -> torch.Tensor:
        return self._broadcast_from_first(super().numpy_callback(function, *arrays))

    def _broadcast_from_first(self, t: torch.Tensor) -> torch.Tensor:
        dist.broadcast(t, group=self.group, group_src=0)
        return t
