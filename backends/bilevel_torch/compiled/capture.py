"""Graphs of the operations of a gradient and of its products, cut where the vector of a product comes in."""

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.func import functionalize, grad, vjp
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel_torch.advice import advice

Tensors = Sequence[torch.Tensor]


class Graphs(NamedTuple):
    """The parts of a captured gradient g(w, λ, data) and its products. Each is a function of tensors.

    Attributes:
        gradient: (*w, *λ, *data) -> (*g, *saved), where the products start from the saved tensors.
        product: (*saved, *v) -> (∂g/∂w)ᵀ v.
        cross: (*saved, *v) -> (∂g/∂λ)ᵀ v.
    """

    gradient: fx.GraphModule
    product: fx.GraphModule
    cross: fx.GraphModule


def capture(loss: Callable[[Tensors, Tensors, Tensors], Any], w: Tensors, hparams: Tensors, data: Tensors) -> Graphs:
    """Capture the gradient of a loss(w, λ, data) of lists of tensors, and its products.

    All operations that do not depend on the vector v go into ``gradient``. So a product only takes the rest.

    Raises:
        RuntimeError: if the loss cannot be captured: it branches on a value, computes with a tensor that is no
            argument, changes an argument, or has an operation that `torch.func` does not support.
    """

    def pulled(w: Tensors, hparams: Tensors, data: Tensors, v: Tensors) -> list[torch.Tensor]:
        g, pull, *_ = vjp(lambda w, h: grad(loss)(w, h, data), w, hparams)
        by_params, by_hparams = pull(v)
        return [*g, *by_params, *by_hparams]

    w, hparams, data = ([t.detach() for t in tensors] for tensors in (w, hparams, data))
    try:
        with torch.enable_grad():
            whole = make_fx(functionalize(pulled), tracing_mode="fake")(
                w, hparams, data, [torch.ones_like(t) for t in w]
            )
    except Exception as error:
        raise RuntimeError(
            f"Compiled: the inner objective cannot be captured. {_way_out(error)}\nPyTorch: {error}"
        ) from error
    return _cut(whole, len(w))


def _way_out(error: Exception) -> str:
    text = str(error)
    if "convert all Tensors to FakeTensors" in text or "non-Fake Tensor" in text:
        return (
            "It computes with a tensor that is no argument. Pass data in inner_args, and run modules by "
            "torch.func.functional_call(module, (params, buffers), (x,)), with their buffers in inner_args."
        )
    if "mutate a captured Tensor" in text:
        return (
            "It changes one of its arguments, such as the running statistics of BatchNorm. Call module.eval(), or use "
            "operations that make new tensors."
        )
    if "data-dependent" in text or "data_dependent" in text or "DataDependent" in type(error).__name__:
        return "It branches on the value of a tensor, or reads it. Use torch.where, or leave out Compiled."
    return advice(text) or "Leave out Compiled, or change the operation that PyTorch names."


def _cut(whole: fx.GraphModule, count: int) -> Graphs:
    """Cut the graph of (*w, *λ, *data, *v) -> (*g, *by_params, *by_hparams)."""
    nodes = list(whole.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    vector = inputs[-count:]
    outputs = list(nodes[-1].args[0])
    moving = set(vector)  # the nodes that depend on v
    for node in nodes:
        if node.op != "output" and any(above in moving for above in node.all_input_nodes):
            moving.add(node)
    g, products = outputs[:count], (outputs[count : 2 * count], outputs[2 * count :])
    ends = {*products[0], *products[1]}
    late = moving & _above(ends)
    # A product that does not depend on v is zero, but it may still be an output.
    saved = [n for n in nodes if n not in moving and (n in ends or not late.isdisjoint(n.users))]
    return Graphs(
        _part(whole, inputs[:-count], g + saved),
        *(_part(whole, saved + vector, product) for product in products),
    )


def _above(outputs: Iterable[fx.Node], stop: Container[fx.Node] = ()) -> set[fx.Node]:
    """Return the nodes that outputs are computed from, and the outputs, down to some nodes."""
    todo = list(outputs)
    seen = set(todo)
    while todo:
        node = todo.pop()
        for above in () if node in stop else node.all_input_nodes:
            if above not in seen:
                seen.add(above)
                todo.append(above)
    return seen


def _part(whole: fx.GraphModule, inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    """Return the part of a graph that computes outputs from inputs."""
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for i, node in enumerate(inputs):
        copies[node] = part.placeholder(f"input_{i}")
        copies[node].meta.update(node.meta)
    needed = _above(outputs, copies)
    for node in whole.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in outputs])
    part.lint()
    return fx.GraphModule(whole, part)
