"""The diagonal preconditioner of an adaptive optimizer."""

from typing import Any

import torch
from typing_extensions import TypeIs

from bilevel_torch.first_order.vectors import norm

MOMENTS = ("max_exp_avg_sq", "exp_avg_sq")  # of AMSGrad, which replaces the other, and of Adam
ADAPTIVE = torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam
FLOOR = 0.1  # against the root mean square of √v̂


def check_adaptive(optimizer: object) -> TypeIs[torch.optim.Optimizer]:
    """Raise a TypeError unless an object is None or an optimizer of the Adam family."""
    if optimizer is not None and not isinstance(optimizer, ADAPTIVE):
        raise TypeError(
            "preconditioner: expected the Adam, AdamW, NAdam or RAdam of torch.optim that trains the module, got "
            f"{type(optimizer).__name__}. Leave it out for other optimizers."
        )
    return optimizer is not None


def inverse_roots(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return 1 / (√v̂ + eps + δ) for each parameter, where v̂ is the average of its squared gradients.

    δ is a tenth of the root mean square of √v̂. Rows of an embedding that have received few gradients have √v̂ ≈ 0, and
    would be nearly all of the vector without δ. A parameter without a state has zero.

    Raise a ValueError if the optimizer has no state, or does not have a parameter.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in groups for p in params):
        raise ValueError("preconditioner: the optimizer does not train all parameters of the module.")
    states = [optimizer.state.get(p, {}) for p in params]
    roots = [_root(state, groups[id(p)]) for p, state in zip(params, states, strict=True) if state]
    if not roots:
        raise ValueError("preconditioner: the optimizer has taken no step. Call FirstOrder.backward after its steps.")
    floor = FLOOR * norm(roots) / sum(root.numel() for root in roots) ** 0.5
    found = iter(roots)
    return [
        1 / (next(found) + (groups[id(p)]["eps"] + floor)) if state else torch.zeros_like(p, requires_grad=False)
        for p, state in zip(params, states, strict=True)
    ]


def _root(state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
    square = next(state[name] for name in MOMENTS if name in state)
    correction = 1 - group["betas"][1] ** torch.as_tensor(state["step"], dtype=torch.float64)
    return (square / correction).sqrt()
