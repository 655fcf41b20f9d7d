"""Clipping of gradients, as in `torch.nn.utils`, with derivatives."""

import torch

from bilevel_torch.training.rules import Options
from bilevel_torch.training.rules.rule import clamp

Gradients = dict[str, torch.Tensor]


def clipped(groups: list[Gradients], options: list[Options]) -> list[Gradients]:
    """Clip the gradients of each group, by ``clip_norm`` or ``clip_value`` of its options.

    The norm is the norm of all gradients, as in `torch.nn.utils.clip_grad_norm_` with all parameters. Its derivative
    at a gradient of zero is zero.
    """
    norm = _norm(groups) if any("clip_norm" in of for of in options) else None
    return [_of_group(gradients, norm, of) for gradients, of in zip(groups, options, strict=True)]


def limits_of(**limits: float | None) -> Options:
    """Return the limits that are given.

    Raises:
        ValueError: for a limit that is no number > 0, or for two limits.
    """
    given = {name: limit for name, limit in limits.items() if limit is not None}
    for name, limit in given.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
            raise ValueError(
                f"{name}: expected a number > 0, got {limit!r}. To differentiate by it, return it from the function "
                "`options`."
            )
    if len(given) > 1:
        raise ValueError("clip_norm and clip_value: give one of them.")
    return given


def _of_group(gradients: Gradients, norm: torch.Tensor | None, options: Options) -> Gradients:
    if "clip_value" in options:
        limit = options["clip_value"]
        gradients = {name: clamp(g, -limit, limit) for name, g in gradients.items()}
    if norm is not None and "clip_norm" in options:
        factor = torch.clamp(options["clip_norm"] / (norm + 1e-6), max=1.0)
        gradients = {name: g * factor.to(g.device, g.dtype) for name, g in gradients.items()}
    return gradients


def _norm(groups: list[Gradients]) -> torch.Tensor:
    norms = [torch.linalg.vector_norm(g) for gradients in groups for g in gradients.values()]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
