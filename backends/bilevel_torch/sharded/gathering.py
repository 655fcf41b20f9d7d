"""Run modules of `fully_shard` without its hooks, so that the graph of a loss leads to the sharded parameters.

The hooks reduce gradients only in ``loss.backward()``. `torch.autograd.grad` would return gradients of one rank,
without an error. So each read of a parameter gathers it by operations that autograd can differentiate twice.
"""
# pyright: reportPrivateUsage=false
# (FSDP2 has no public way around its hooks. All private names of it are in this file.)

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary, ref

import torch
from torch.autograd.graph import saved_tensors_hooks

from bilevel_torch.sharded.large_operations import GATHERED, READS, LargeOperations, Read, mark
from bilevel_torch.shards import is_dtensor, local, placed, wrapped


class Gathering:
    """The parameters of a module that `fully_shard` has sharded.

    Args:
        module: a module. If no part of it is sharded by `fully_shard`, `forward` changes nothing.

    Raises:
        ValueError: for parameters that FSDP keeps on the CPU.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.running = False
        self.states = _states(module)
        self.params: dict[torch.nn.Module, dict[str, Any]] = {}  # records of FSDP, by module and name
        self.meshes: set[Any] = set()
        self.classes: dict[torch.nn.Module, type] = {}  # with properties that gather
        self.weights = _Weights()
        for state in self.states:
            for record in _records(state):
                record.__dict__.setdefault("param_dtype", state._mp_policy.param_dtype)  # FSDP sets it later
                if record.offload_to_cpu:
                    raise ValueError("Sharded: CPUOffloadPolicy is not supported. Keep the parameters on the device.")
                info = record._module_info
                places = zip(
                    [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names], strict=True
                )
                for part, name in places:
                    self.params.setdefault(part, {})[name] = record
                self.meshes.add(record.sharded_param.device_mesh)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Let the module read gathered parameters, and free each gathered parameter after its use."""
        if self.running or not self.states:
            yield
            return
        self.running = True
        self.weights.start(record for state in self.states for record in _staying(state))
        with ExitStack() as stack:
            stack.callback(setattr, self, "running", False)
            if "torch._dynamo" in sys.modules:  # it would compile again, and has no second derivative
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for state in self.states:
                for part in state._modules:
                    part.reshard()
                stack.enter_context(_casts_only(state))
            for part in self.params:
                stack.callback(setattr, part, "__class__", type(part))
                part.__class__ = self._reading(part)
            stack.enter_context(saved_tensors_hooks(self.weights.pack, self.weights.unpack))
            stack.enter_context(LargeOperations(self.weights.pack))
            yield

    def _reading(self, part: torch.nn.Module) -> type:
        """Return the class of a module with properties in place of its parameters, which gather them."""
        own = type(part)
        if part not in self.classes or self.classes[part].__base__ is not own:
            properties = {name: _Gathered(name, record, self.weights) for name, record in self.params[part].items()}
            self.classes[part] = type(own.__name__, (own,), {**properties, "__module__": own.__module__})
        return self.classes[part]

    def unsharded(self) -> dict[int, str]:
        """Return the names of the parameters as the hooks of FSDP gather them, by their ids.

        If the module is a part of a larger one, the other parameters of that are included.
        """
        states = [*self.states, *(other for state in self.states for other in state._state_ctx.all_states)]
        records = (record for state in states for record in _records(state))
        return {
            id(r._unsharded_param): r._param_fqn or r._module_info.param_name
            for r in records
            if hasattr(r, "_unsharded_param")
        }


class _Gathered:
    """A property of a module: a sharded parameter as a whole tensor."""

    def __init__(self, name: str, record: Any, weights: "_Weights") -> None:
        self.name, self.record, self.weights = name, record, weights

    def __get__(self, part: Any, owner: object = None) -> Any:
        if part is None:
            return self
        param = part._parameters[self.name]
        try:
            return self.weights.read(param, self.record) if is_dtensor(param) else param
        except AttributeError as error:  # else the module would return the sharded parameter
            raise RuntimeError(f"Sharded: this version of PyTorch is not supported: {error}") from error


class _Weights:
    """Gathered parameters. A graph that saves one saves the sharded parameter in its place, unless it stays."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, Any, Any, Any]] = {}  # by the address of the storage
        self.staying: set[Any] = set()
        self.kept: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by the id of the parameter

    def start(self, staying: Iterable[Any]) -> None:
        """Forget the values of parameters. The records are of those that stay gathered, as long as their graphs."""
        self.staying = set(staying)
        self.kept.clear()

    def read(self, param: Any, record: Any) -> Any:
        """Return a whole parameter. Its gradient is averaged over the ranks, and sharded as the parameter is."""
        kept = None
        if record in self.staying and (kept := self.kept.get(id(param))) is None:
            kept = self.kept[id(param)] = _gather(param.detach(), record)
        get = partial(self._gathered, record=record)
        get_param = get if kept is None else partial(get, kept=[kept])
        whole = get_param(param)
        if whole.grad_fn is not None:
            read = Read(param, mark(param), get_param, get, lambda g: _Reduced.apply(g, record))
            whole.grad_fn.metadata.update({GATHERED: read, READS: [read]})
        return whole

    def _gathered(self, t: Any, record: Any, kept: Sequence[Any] = ()) -> Any:
        """Return a parameter or a vector like it as a whole tensor, from memory if it is there."""
        whole: Any = _Whole.apply(t, record, kept)
        if not kept:
            self._remember(whole, t, record)
        return whole

    def _remember(self, whole: Any, param: Any, record: Any) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = local(whole).untyped_storage()
        if storage.data_ptr() == local(param).untyped_storage().data_ptr():  # one rank: it is no copy
            return
        for address, (reference, *_) in list(self.known.items()):
            if reference.expired():
                del self.known[address]
        # A weak reference keeps the address in use, so that no other storage gets it.
        self.known[storage._cdata] = StorageWeakRef(storage), param, record, ref(whole)

    def pack(self, t: Any) -> Any:
        """Return what a graph saves for a tensor."""
        part = local(t)
        if part.layout != torch.strided or (found := self.known.get(part.untyped_storage()._cdata)) is None:
            return t
        _, param, record, whole = found
        layout = (t.device_mesh, t.placements, t.shape, t.stride()) if is_dtensor(t) else None
        view = part.shape, part.stride(), part.storage_offset()
        return _Saved(param, record, whole, view, layout)

    def unpack(self, saved: Any) -> torch.Tensor:
        """Return the tensor that was saved, from the sharded parameter."""
        if not isinstance(saved, _Saved):
            return saved
        with torch.no_grad():
            if (whole := saved.whole()) is None:  # it has been freed
                whole = _gather(saved.param, saved.record)
                self._remember(whole, saved.param, saved.record)
            part = local(whole).as_strided(*saved.view)
            if saved.layout is None:
                return part
            mesh, placements, shape, stride = saved.layout
            return type(saved.param).from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


class _Saved(NamedTuple):
    """A gathered parameter that a graph saves: the sharded parameter, and the view of it."""

    param: Any
    record: Any
    whole: Callable[[], Any]
    view: tuple[torch.Size, tuple[int, ...], int]
    layout: tuple[Any, ...] | None


class _Whole(torch.autograd.Function):
    """Gather a parameter. The gradient is averaged over the ranks of the data, and sharded as the parameter is."""

    @staticmethod
    def forward(ctx: Any, param: Any, record: Any, kept: Sequence[Any]) -> Any:
        ctx.record = record
        ctx.set_materialize_grads(False)  # PyTorch's zeros would be no DTensors
        return kept[0].detach() if kept else _gather(param, record)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:  # pyright: ignore
        return None if g is None else _Reduced.apply(g, ctx.record), None, None


class _Reduced(torch.autograd.Function):
    """The transpose of `_Whole`, for gradients of one rank that count as parts of a mean."""

    @staticmethod
    def forward(ctx: Any, g: Any, record: Any) -> Any:
        ctx.record = record
        ctx.set_materialize_grads(False)
        return _reduce(g, record)

    @staticmethod
    def backward(ctx: Any, v: Any) -> Any:  # pyright: ignore
        return None if v is None else _Whole.apply(v, ctx.record, ()), None


def _gather(param: Any, record: Any) -> Any:
    """Return a parameter, whole over the ranks of the data, with the layout of tensor parallelism if it has one."""
    from torch.distributed.tensor import DTensor, Replicate

    param = placed(param, record.sharded_param)  # operations may have changed the layout of a gradient
    whole, mesh, placements = record._unsharded_dtensor_spec, record.mesh_info.mesh, _placements(record)
    part = local(param if record.param_dtype is None else param.to(record.param_dtype))
    shape, stride = record._orig_size, record._contiguous_orig_stride
    part = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
    gathered = part.redistribute(placements=[Replicate()] * mesh.ndim).to_local()
    if whole is None:
        return gathered
    return DTensor.from_local(
        gathered, whole.mesh, whole.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def _reduce(g: Any, record: Any) -> Any:
    """Return the mean over the ranks of the data of gradients by a gathered parameter, sharded as the parameter is."""
    from torch.distributed.tensor import DTensor, Partial

    whole, mesh, param = record._unsharded_dtensor_spec, record.mesh_info.mesh, record.sharded_param
    if whole is not None:
        g = g.redistribute(placements=whole.placements).to_local()
    partial = DTensor.from_local(g.detach(), mesh, [Partial("avg")] * mesh.ndim, run_check=False)
    part = partial.redistribute(placements=_placements(record)).to_local().to(param.dtype)
    return wrapped(part, param)


def _placements(record: Any) -> list[Any]:
    """Return the placements of a parameter on the mesh of the data: the last dimension shards it."""
    from torch.distributed.tensor import Replicate

    if record._unsharded_dtensor_spec is None:
        return list(record.sharded_param.placements)
    return [*[Replicate()] * (record.mesh_info.mesh.ndim - 1), record.fsdp_placement]


def _states(module: torch.nn.Module) -> list[Any]:
    """Return the states of FSDP in a module, each once."""
    parts: list[Any] = [part for part in module.modules() if type(part).__name__.startswith("FSDP")]
    states = [part._get_fsdp_state() for part in parts if hasattr(part, "_get_fsdp_state")]
    return list({id(state): state for state in states}.values())


def _records(state: Any) -> Iterable[Any]:
    return (record for group in state._fsdp_param_groups for record in group.fsdp_params)


def _staying(state: Any) -> Iterable[Any]:
    """Return the records of parameters for which the user set ``reshard_after_forward=False``."""
    if state._auto_reshard_after_forward:  # the default: PyTorch decides
        return []
    return (r for group in state._fsdp_param_groups if not group._reshard_after_forward for r in group.fsdp_params)


@contextmanager
def _casts_only(state: Any) -> Iterator[None]:
    """Replace the hooks of a module by the part that converts inputs and outputs for mixed precision."""

    def before(_: object, args: Any, kwargs: Any) -> Any:
        return state._cast_forward_inputs(args, kwargs)

    def after(_: object, __: object, output: Any) -> Any:
        return state._cast_output_dtype(output)

    pairs = [(state._pre_forward_hook_handle, "_forward_pre_hooks", before)]
    pairs += [(state._post_forward_hook_handle, "_forward_hooks", after)]
    replaced = [
        (hooks, key, hooks[key], hook)
        for handle, name, hook in pairs
        for part in state._modules
        for hooks in [getattr(part, name)]
        for key in _ids(handle)
        if key in hooks
    ]
    for hooks, key, _, hook in replaced:
        hooks[key] = hook
    try:
        yield
    finally:
        for hooks, key, own, _ in replaced:
            hooks[key] = own


def _ids(handle: Any) -> list[int]:
    return [h.id for h in getattr(handle, "handles", (handle,))]
