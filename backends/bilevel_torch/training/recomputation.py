"""Find graphs that compute a part of a model again in the backward pass, with other weights.

`torch.utils.checkpoint` runs modules again when a graph is differentiated. By then, `torch.func.functional_call`
has given the modules their own weights back. The derivative would be wrong, and PyTorch raises no error.
"""

from collections.abc import Sequence
from typing import Any

import torch

from bilevel_torch.autograd import grad
from bilevel_torch.graph import nodes_of, weight_norm_right
from bilevel_torch.training.calls import Caller, Tensors


def check_graph(name: str, caller: Caller, params: Tensors, buffers: Tensors, outputs: Sequence[torch.Tensor]) -> None:
    """Differentiate the outputs by the weights while the model has weights of nan.

    Raises:
        RuntimeError: if the result contains nan only then, so that the backward pass reads the weights of the model.
            From PyTorch, with advice, if the outputs have no derivative.
    """
    inputs = list(params.values())
    if not outputs:
        return

    def derivatives(*_: Any) -> list[torch.Tensor | None]:
        with weight_norm_right(nodes_of(outputs)):
            return grad(outputs, inputs, [torch.ones_like(t) for t in outputs], retain_graph=True)

    nowhere = {key: torch.full_like(param, float("nan"), requires_grad=True) for key, param in params.items()}
    found, _ = caller.call(nowhere, buffers, derivatives, (), record=False)
    if not _finite(found) and _finite(derivatives()):
        raise RuntimeError(
            f"{name}: its backward pass computes a part of the model again, as torch.utils.checkpoint does, and would "
            "take the weights of another step. Turn off the checkpoints in the model: a run stores only some of its "
            "steps, and computes the others again."
        )


def _finite(tensors: Sequence[torch.Tensor | None]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t is not None)
