"""Hypergradients of models whose parameters are DTensors."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.graph import Node
from typing_extensions import override

from bilevel.backend import Backend, Data, R, Rest
from bilevel.inspection.entries import Entries
from bilevel.inspection.not_finite import FIRST, SECOND, described, find_not_finite
from bilevel.linearization import Inputs, LinearizedMap, OuterDerivatives
from bilevel.micro_batches import MicroBatches
from bilevel.problems.model_loss import ModelLoss
from bilevel.spaces.array import Args, H, P, V
from bilevel.spaces.tree import leaves, with_leaves
from bilevel_torch.autograd import LEAF, advised, scalar
from bilevel_torch.backend import TorchBackend, check_recording
from bilevel_torch.data_parallel import DataParallel
from bilevel_torch.graph import nodes_of
from bilevel_torch.roll_call import named, named_ranks
from bilevel_torch.sharded.gathering import Gathering
from bilevel_torch.sharded.large_operations import READS, changed
from bilevel_torch.sharded.space import ShardedSpace
from bilevel_torch.sharded.transitions import prepare
from bilevel_torch.shards import is_dtensor, is_split, local

WITHIN = (
    "Compute the two losses inside of `with backend.losses():`, where backend is the Sharded(module) of the call, and "
    "module is the whole module. The hooks of fully_shard reduce gradients only in loss.backward(), so these "
    "derivatives would be of one rank."
)

GRADIENT = "The {} loss is finite, but its gradient is nan or infinite. " + FIRST
PRODUCT = (
    "The inner loss and its gradient are finite, but a product with the derivative of ∂L/∂w is nan or infinite. "
    + SECOND
)


class Sharded(DataParallel):
    """The torch backend for parameters that are sharded over ranks: the hypergradient of all data, on every rank.

    Parameters are DTensors, as `fully_shard` (FSDP2) and ``parallelize_module`` (tensor parallelism) make them. Every
    vector of the solver is sharded as the parameters are. Compute the losses in the context `losses`, and pass the
    backend on all ranks:

        backend = bilevel_torch.Sharded(net, inner_samples=len(y), outer_samples=len(y_val))
        with backend.losses():
            inner_loss, outer_loss = loss(net(x), y), loss(net(x_val), y_val)
        bilevel_torch.backward(inner_loss, outer_loss, net.parameters(), hparams, backend=backend)

    Each loss is a mean over the samples of the rank's batch. The backend solves the problem of the means over all
    samples, as `DataParallel` does. A loss that is a DTensor is a loss of all data.

    Hyperparameters are plain tensors that are equal on all ranks, or DTensors. Parameters that are no DTensors are
    equal on all ranks. The mesh of each DTensor has all ranks of the group.

    With `bilevel.hypergradient`, the backend itself evaluates the objectives in the context `losses`.

    Args:
        module: the module that computes the losses. It matters only if `fully_shard` has sharded parts of it.
        inner_samples: number of samples in the mean of this rank's inner loss; None: the same number on every rank.
        outer_samples: number of samples in the mean of this rank's outer loss; None: the same number on every rank.
        group: the process group; None: the default group.

    Raises:
        ValueError: if there is no process group, this process is not in it, a count is negative, or FSDP keeps
            parameters on the CPU. When called, if a loss was computed outside of `losses`, or a mesh lacks ranks. When
            called, on all ranks, if only some ranks give counts, or the layouts of params or hparams, or the solvers,
            differ.
        TypeError: for Gauss-Newton products, `bilevel.MicroBatches`, several outer objectives at once,
            `bilevel.diagnose`, and solvers that need the whole matrix (``exact``).

    >>> import torch, bilevel_torch, torch.distributed as dist
    >>> from torch.distributed.fsdp import fully_shard
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(net.weight)
    >>> _ = fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    >>> backend, decay = bilevel_torch.Sharded(net), torch.tensor(0.5, requires_grad=True)
    >>> with backend.losses():
    ...     y = net(torch.ones(1, 1))
    ...     inner, outer = (y - 1).square().sum() + decay * y.square().sum(), (y - 2).square().sum()
    >>> hg = bilevel_torch.backward(inner, outer, net.parameters(), decay, backend=backend)
    >>> decay.grad
    tensor(1.3333)
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        *,
        inner_samples: float | None = None,
        outer_samples: float | None = None,
        group: Any = None,
    ) -> None:
        super().__init__(inner_samples=inner_samples, outer_samples=outer_samples, group=group)
        if module is not None and not isinstance(module, torch.nn.Module):
            got = module.__name__ if isinstance(module, type) else type(module).__name__
            raise TypeError(f"Sharded: expected the module that computes the losses, got {got}.")
        self.ranks = dist.get_world_size(group)
        self.module = torch.nn.Module() if module is None else module
        self.gathering = Gathering(self.module)

    @contextmanager
    def losses(self) -> Iterator[None]:
        """Compute losses in this context: their graphs lead to the sharded parameters.

        The module reads each parameter by an all-gather, and the hooks of `fully_shard` do not run. Graphs store no
        gathered parameter. A product gathers it again. After the context, the module trains as before.

        ``module.parameters()`` are the sharded parameters. For a penalty, sum over them, and convert the sum once:
        ``sum((p**2).sum() for p in module.parameters()).full_tensor()``.
        """
        with named_ranks(self.label, self.group, self._groups()), self.gathering.forward(), advised():
            yield

    @override
    def space(self, tree: V) -> ShardedSpace[V]:
        return ShardedSpace(tree, self.group)

    @override
    def check_leaf(self, path: str, leaf: torch.Tensor) -> None:
        check_recording(path, leaf)
        if id(leaf) in self.gathering.unsharded():
            raise ValueError(f"{path} is a parameter that the hooks of fully_shard have gathered. {WITHIN}")
        t: Any = leaf
        if is_dtensor(t) and not self._has_data(t.device_mesh):
            raise ValueError(
                f"{path} is on a mesh of {t.device_mesh.size()} of {self.ranks} ranks, and fully_shard does not shard "
                "it over the others. Use a mesh with all ranks of the group, or fully_shard over the other dimension."
            )

    @override
    def _groups(self) -> Iterable[Any]:
        params: list[Any] = list(self.module.parameters())
        meshes = {p.device_mesh for p in params if is_dtensor(p)}
        return [self.group, *(group for mesh in meshes for group in mesh.get_all_groups())]

    @override
    def located(self, find: Callable[[Backend], str], *losses: torch.Tensor) -> str:
        if not losses:
            return ""
        values = [float(local(loss.detach())) for loss in losses]
        where = described(find_not_finite(self, {}, values[0], values[1], Entries({}, {}, {}, {}, {})))
        params = [p for p in self.module.parameters() if p.requires_grad]

        def gradient(loss: torch.Tensor) -> tuple[Any, ...]:
            return torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)

        def product(loss: torch.Tensor) -> tuple[Any, ...]:
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            grads = [g for g in grads if g is not None and g.requires_grad]
            if not grads:
                return ()
            v = [torch.ones_like(g) for g in grads]
            return torch.autograd.grad(grads, params, v, retain_graph=True, allow_unused=True)

        texts = [(loss, gradient, GRADIENT.format(name)) for loss, name in zip(losses, ("inner", "outer"), strict=True)]
        for loss, derivative, text in [*texts, (losses[0], product, PRODUCT)]:
            if not self._is_finite(derivative, loss) and not where:  # all ranks compute all derivatives
                where = text
        return self._of_ranks(where)

    def _is_finite(self, derivative: Callable[[torch.Tensor], object], loss: torch.Tensor) -> bool:
        """Return whether a derivative of this rank by the outputs of the layers is finite."""
        finite = []

        def look(grads: Iterable[Any]) -> None:
            finite.extend(bool(torch.isfinite(local(g)).all()) for g in grads if g is not None)

        nodes: list[Any] = list(nodes_of([loss]))
        handles = [node.register_prehook(look) for node in nodes if READS in node.metadata]
        self._within(derivative)(loss)
        for handle in handles:
            handle.remove()
        return all(finite)

    @override
    def to_numpy(self, array: torch.Tensor | np.ndarray) -> np.ndarray:
        return super().to_numpy(local(array))  # for messages, which may be of one rank

    @override
    def inner(self, objective: Callable[..., object], params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        _check_whole(args)
        return TorchBackend.inner(self, self._within(objective), params, hparams, args)

    @override
    def _within(self, function: Callable[Rest, R]) -> Callable[Rest, R]:
        """Return a function that runs in the context `losses`."""

        def run(*args: Rest.args, **options: Rest.kwargs) -> R:
            with self.gathering.forward():
                return function(*args, **options)

        return run

    @override
    def gauss_newton(self, inner: ModelLoss, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        raise TypeError('Sharded: curvature="gauss-newton" is not supported. Use a solver with damping instead.')

    @override
    def outer(
        self, objective: Callable[..., object], params: P, hparams: H, args: Args, **options: Any
    ) -> OuterDerivatives[P, H]:
        _check_whole(args)
        return TorchBackend.outer(self, self._within(objective), params, hparams, args, **options)

    @override
    def outers(self, objective: Any, params: P, hparams: H, args: Args) -> OuterDerivatives[P, H]:
        raise TypeError("Sharded: several outer objectives at once are not supported. Make one call for each.")

    @override
    @contextmanager
    def isolated(self, inputs: Inputs[P, H], double: bool) -> Iterator[Any]:
        raise TypeError("Sharded: diagnose is not supported. Run it in one process, on a small copy of the model.")
        yield  # pyright: ignore[reportUnreachable]

    @override
    def _loss(self, label: str, value: object, data: Data) -> torch.Tensor:
        """Return a loss times a weight, so that its derivatives have to be averaged over the ranks."""
        loss: Any = scalar(label, value)
        with torch.enable_grad():
            nodes = list(nodes_of([loss]))
            if is_dtensor(loss):  # of the data of all ranks
                self._check_no_mixture(label, loss, nodes)
                prepare(nodes, self.group, lambda _: False)
                return loss.full_tensor()
            self._check_within(label, nodes)
            self._check_no_parts(label, nodes)
            self._check_unchanged(label, nodes)
            weight = super()._share(data, loss.device) * self.ranks
            prepare(nodes, self.group, self._has_data if self.gathering.states or weight != 1 else lambda _: False)
            return loss * weight

    def _has_data(self, mesh: Any) -> bool:
        """Return whether ranks of a mesh may have different data: not if the mesh is only of tensor parallelism."""
        return mesh.size() == self.ranks or mesh in self.gathering.meshes

    def _check_within(self, label: str, nodes: Iterable[Node]) -> None:
        """Raise a ValueError if a loss was computed with the hooks of FSDP."""
        unsharded = self.gathering.unsharded()
        leaf_nodes: list[Any] = [node for node in nodes if node.name() == LEAF]
        variables = [id(node.variable) for node in leaf_nodes]
        if names := [unsharded[key] for key in variables if key in unsharded]:
            raise ValueError(f"{label} was computed with the gathered parameter {names[0]!r}. {WITHIN}")

    def _check_no_mixture(self, label: str, loss: Any, nodes: Iterable[Any]) -> None:
        """Raise a ValueError if a DTensor is the sum of a loss of one rank's data and a penalty."""
        if loss.device_mesh in self.gathering.meshes and any(READS in node.metadata for node in nodes):
            raise ValueError(
                f"{label} is a DTensor, but the module has computed a part of it from the batch of one rank. Convert "
                "penalties on module.parameters() before you add them: penalty.full_tensor()."
            )

    def _check_no_parts(self, label: str, nodes: Iterable[Node]) -> None:
        """Raise a ValueError if a loss contains the rank's part of a sharded parameter or hyperparameter."""
        for node in nodes:
            spec = getattr(node, "dtensor_spec", None)
            if spec is not None and spec.mesh in self.gathering.meshes and any(map(is_split, spec.placements)):
                raise ValueError(
                    f"{label} contains a part of a sharded tensor, from to_local(). So it would count a penalty of "
                    "one rank only. Use full_tensor(), for example of the sum: sum((p**2).sum() for p in "
                    "module.parameters()).full_tensor()."
                )

    def _check_unchanged(self, label: str, nodes: Iterable[Node]) -> None:
        """Raise a RuntimeError on all ranks if a parameter has changed on any rank since a loss was computed."""
        if (flag := changed(nodes)) is None:
            return
        flags = zip(dist.get_process_group_ranks(self.group), self._gathered(flag[None]), strict=True)
        if ranks := [rank for rank, [flag] in flags if flag]:
            raise RuntimeError(
                f"{label}: a parameter has changed since the loss was computed, for example by an optimizer step, on "
                f"{named(ranks)}. Compute the losses again before the call."
            )

    @override
    def _averaged(self, own: LinearizedMap[P, H], hparams: H) -> LinearizedMap[P, H]:
        # A checkpoint inside of the module runs it again in each product.
        products = {name: self._within(getattr(own, name)) for name in ("vjp_params", "vjp_hparams")}
        # The transpose would differentiate a redistribution three times, which PyTorch does not support.
        return super()._averaged(own._replace(**products, jvp_hparams=None), hparams)

    @override
    def _share(self, data: Data, device: torch.device) -> float:
        return 1 / self.ranks  # the losses have weights

    @override
    def _mean(self, tree: V, share: float) -> V:
        """Return the mean over the ranks of plain tensors. DTensors are already means."""
        plain = iter(super()._mean([t for t in leaves(tree) if not is_dtensor(t)], share))
        return with_leaves(tree, [t if is_dtensor(t) else next(plain) for t in leaves(tree)])


def _check_whole(args: object) -> None:
    if isinstance(args, MicroBatches):
        raise TypeError("Sharded: bl.MicroBatches is not supported. Use activation checkpoints in the module.")
