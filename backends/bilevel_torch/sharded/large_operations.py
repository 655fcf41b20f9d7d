"""Large operations of gathered parameters, with one reduction of each gradient in a product.

A product has two gradients by each parameter: one from the backward pass inside of ∇L, one from the forward pass. If
both arrive at one gathered parameter, autograd keeps the first until the second is there. So each rank would hold a
whole vector. Here the first one is not computed at once. Its factors, which are as large as activations, stay until the
second one is computed. Then both are reduced together.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from bilevel_torch.shards import local

LARGE = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__),
}
"""Operations of an input, a weight and, as the third argument, a bias. They are linear in the last two together."""

READS = "parameters read by bilevel"
"""The key of a list of `Read` in the metadata of a node."""
GATHERED = "parameter gathered by bilevel"
"""The key of a `Read` in the metadata of a node that gathers a parameter."""


class Read(NamedTuple):
    """A sharded parameter that a graph reads.

    Attributes:
        param: the sharded parameter.
        mark: the sum of its entries on this rank.
        whole: the function that returns it whole, for the sharded parameter as a graph saves it.
        gather: the function that gathers a vector like it.
        reduce: the function that reduces a gradient by the gathered parameter.
    """

    param: Any
    mark: torch.Tensor
    whole: Callable[[Any], torch.Tensor]
    gather: Callable[[Any], torch.Tensor]
    reduce: Callable[[torch.Tensor], Any]


def mark(param: Any) -> torch.Tensor:
    """Return a number that changes with the entries of a parameter on this rank."""
    return torch.nan_to_num(local(param)).sum(dtype=torch.float64)


def changed(nodes: Iterable[Any]) -> torch.Tensor | None:
    """Return whether a parameter has changed since a graph read it, as a number; None if the graph reads none.

    PyTorch's own check sees no change of a DTensor by a foreach or a fused optimizer.
    """
    differ = [mark(read.param) != read.mark for node in nodes for read in node.metadata.get(READS, [])]
    return torch.stack(differ).any().double() if differ else None


class LargeOperations(TorchFunctionMode):
    """Replace large operations of gathered parameters by functions of the sharded parameters.

    Args:
        pack: the function by which graphs save gathered parameters, outside of checkpoints.
    """

    def __init__(self, pack: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs or not torch.is_grad_enabled() or self._in_checkpoint():
            return func(*args, **(kwargs or {}))
        if func is torch.addmm and any(map(_read, args[1:])):  # the bias is the first argument
            return args[0] + self.__torch_function__(torch.mm, types, args[1:])
        reads = {i: read for i, a in enumerate(args) if (read := _read(a))} if func in LARGE else {}
        tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and i not in reads]
        if not reads or len(tensors) != 1 or min(reads) > 1:
            return func(*args)
        operation = _Operation(func, args, tensors[0], reads)
        params = [read.param for read in reads.values()]
        result, _ = _Large.apply(operation, [args[i] for i in reads], args[tensors[0]], *params)
        result.grad_fn.metadata[READS] = [*reads.values()]
        return result

    def _in_checkpoint(self) -> bool:
        """Return whether a checkpoint runs, which computes all its operations again."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
        return hooks is not None and hooks[0] != self.pack


def _read(value: object) -> Read | None:
    """Return the parameter that a value is; None for any other value."""
    node: Any = value.grad_fn if isinstance(value, torch.Tensor) else None
    return None if node is None else node.metadata.get(GATHERED)


class _Operation:
    """An operation of one input and sharded parameters. It has a separate graph, which saves no gathered parameter.

    Args:
        function: the operation.
        args: its arguments.
        place: the place of the input among the arguments.
        reads: the parameters, by their places. The first is the weight.
    """

    def __init__(self, function: Any, args: Sequence[Any], place: int, reads: dict[int, Read]) -> None:
        self.function, self.place, self.reads = function, place, reads
        self.args = [None if isinstance(a, torch.Tensor) else a for a in args]
        device = args[place].device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.precision = torch.autocast(device, dtype, enabled, cache_enabled=False)
        self.later: tuple[int, list[Any]] = (-1, [])  # first gradients by the weight, of the backward pass of a number

    def __call__(self, x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        """Return the result with other tensors. Parameters that are not given are zero, except for the weight."""
        args = [*self.args]
        args[self.place] = x
        for i, param in zip(self.reads, params, strict=False):
            args[i] = param
        with torch._C.DisableTorchFunction(), self.precision:
            return self.function(*args)

    def run(self, whole: Sequence[torch.Tensor], x: torch.Tensor, needs_x: bool) -> torch.Tensor:
        """Return the result, and keep its graph."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(needs_x)
            y = self(x, *whole)
        self.edges = [get_gradient_edge(t) if t.requires_grad else None for t in (x, *whole)]
        self.output = get_gradient_edge(y)
        return y.detach()

    def gradients(self, g: torch.Tensor | None, wanted: Sequence[bool]) -> list[Any]:
        """Return the gradients by the input and the parameters, with those that have been put off."""
        found: list[Any] = [None] * len(wanted)
        places = [i for i, needed in enumerate(wanted) if needed]
        if g is not None and places:
            edges: Any = [self.edges[i] for i in places]
            for i, grad in zip(places, torch.autograd.grad(self.output, edges, g, retain_graph=True), strict=True):
                found[i] = grad
        for put_off in self._take():
            (grad,) = torch.autograd.grad(*put_off)
            found[1] = grad if found[1] is None else found[1].add_(grad)
            del grad
        for i, read in enumerate(self.reads.values(), 1):
            if found[i] is not None:
                whole, found[i] = found[i], None
                found[i] = read.reduce(whole)
        return found

    def put_off(self, *gradient: Any) -> None:
        """Keep the arguments of `torch.autograd.grad` for a gradient by the weight until `gradients` is called."""
        now = torch._C._current_graph_task_id()
        if self.later[0] != now:  # an error may have ended the pass before
            self.later = now, []
        self.later[1].append(gradient)

    def _take(self) -> list[Any]:
        (number, gradients), self.later = self.later, (-1, [])
        return gradients if number == torch._C._current_graph_task_id() else []


class _Large(torch.autograd.Function):
    """An operation of sharded parameters. Its second output makes its backward pass the last that uses the weight."""

    @staticmethod
    def forward(ctx: Any, operation: _Operation, whole: Sequence[Any], x: torch.Tensor, *params: Any) -> Any:
        ctx.operation = operation
        ctx.set_materialize_grads(False)
        y, last = operation.run(whole, x, ctx.needs_input_grad[2]), torch.zeros((), device=x.device)
        ctx.save_for_backward(last, x, *params)
        return y, last

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None, _: object) -> Any:  # pyright: ignore
        wanted = ctx.needs_input_grad[2:]
        if g is not None and torch.is_grad_enabled():
            return None, None, *_Gradients.apply(ctx.operation, wanted, g, *ctx.saved_tensors)
        return None, None, *ctx.operation.gradients(g, wanted)


class _Gradients(torch.autograd.Function):
    """The gradients of an operation, by its input and its sharded parameters."""

    @staticmethod
    def forward(ctx: Any, operation: _Operation, wanted: Any, g: Any, last: Any, x: Any, *params: Any) -> Any:
        ctx.operation, ctx.wanted = operation, wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, *params)
        return tuple(operation.gradients(g, wanted))

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor | None, *vs: Any) -> Any:  # pyright: ignore
        if torch.is_grad_enabled() and any(t is not None for t in (u, *vs)):
            return _with_derivatives(ctx, u, vs)
        operation, (g, x, *params) = ctx.operation, ctx.saved_tensors
        first = next(iter(operation.reads.values()))
        needs_x, needs_weight = ctx.needs_input_grad[4:6]
        by_g = by_last = by_x = None
        if any(v is not None for v in vs):
            by_g, by_x = _along_params(operation, g, x, params, vs, needs_x)
        if u is not None:
            # The parameters are one after the other in memory.
            with torch.set_grad_enabled(needs_weight):
                weight = first.whole(params[0])
                y = operation(u.detach(), weight)
            if needs_weight:
                operation.put_off(get_gradient_edge(y), [get_gradient_edge(weight)], g)
                by_last = torch.zeros((), device=u.device)
            by_g = y.detach() if by_g is None else by_g + y.detach()
        return None, None, by_g, by_last, by_x, *[None] * len(params)


def _along_params(operation: _Operation, g: Any, x: Any, params: Any, vs: Any, needs_x: bool) -> Any:
    """Return the result for a vector in place of the parameters, and the derivative of its product with g by x."""
    pairs = zip(operation.reads.values(), params, vs, strict=True)
    whole = [read.gather(torch.zeros_like(p) if v is None else v) for read, p, v in pairs]
    with torch.enable_grad():
        x = x.detach().requires_grad_(needs_x)
        y = operation(x, *whole)
    return y.detach(), torch.autograd.grad(y, x, g)[0] if needs_x else None


def _with_derivatives(ctx: Any, u: Any, vs: Any) -> Any:
    """Return what `_Gradients.backward` returns, with its own derivatives."""
    operation, (g, x, *params) = ctx.operation, ctx.saved_tensors
    reads = [*operation.reads.values()]
    g, x = g.view_as(g), x.view_as(x)  # one may be computed from the other
    whole = [read.whole(p) for read, p in zip(reads, params, strict=True)]
    places = [i for i, needed in enumerate(ctx.wanted) if needed]
    grads = torch.autograd.grad(operation(x, *whole), [[x, *whole][i] for i in places], g, create_graph=True)
    outputs = [grad if i == 0 else reads[i - 1].reduce(grad) for i, grad in zip(places, grads, strict=True)]
    pairs = [(out, c) for out, i in zip(outputs, places, strict=True) if (c := (u, *vs)[i]) is not None]
    tensors = zip((2, 4, *range(5, 5 + len(whole))), (g, x, *whole), strict=True)
    inputs = {i: t for i, t in tensors if ctx.needs_input_grad[i]}
    outs, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(outs, [*inputs.values()], cotangents, create_graph=True, allow_unused=True)
    result: list[Any] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(inputs, found, strict=True):
        result[i] = reads[i - 5].reduce(grad) if i > 4 and grad is not None else grad
    return tuple(result)
