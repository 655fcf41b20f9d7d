"""Adam and its relatives, as in `torch.optim`."""

from functools import partial

import torch

from bilevel_torch.training.rules.rule import Options, Slots, average, decayed, loss_gradient, root, scalar, value

Result = tuple[torch.Tensor, Slots]


def start_adam(param: torch.Tensor, options: Options) -> Slots:
    """Return moments of zero."""
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options.get("amsgrad", False) else [])]
    return {"step": 0, **{name: torch.zeros_like(param) for name in names}}


def start_nadam(param: torch.Tensor, options: Options) -> Slots:
    """Return moments of zero and an empty product."""
    return {**start_adam(param, options), "mu_product": scalar(param, 1.0)}


def start_adamax(param: torch.Tensor, options: Options) -> Slots:
    """Return a moment and a norm of zero."""
    return {"step": 0, "exp_avg": torch.zeros_like(param), "exp_inf": torch.zeros_like(param)}


def _begun(
    param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options, decoupled: bool
) -> tuple[torch.Tensor, torch.Tensor, Slots]:
    """Return the decayed parameter, the gradient, and slots with the next step and both moments."""
    grad = loss_gradient(param, grad, options, decay=not decoupled)
    beta1, beta2 = options["betas"]
    mean = average(slots["exp_avg"], grad, beta1)
    square = beta2 * slots["exp_avg_sq"] + (1 - beta2) * grad * grad
    moved = {**slots, "step": slots["step"] + 1, "exp_avg": mean, "exp_avg_sq": square}
    return decayed(param, options) if decoupled else param, grad, moved


def adam(
    param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options, *, decoupled: bool | None = None
) -> Result:
    """Kingma & Ba, Adam: a method for stochastic optimization, ICLR 2015. AMSGrad: Reddi, Kale & Kumar, ICLR 2018."""
    if decoupled is None:
        decoupled = bool(options.get("decoupled_weight_decay", False))
    param, _, slots = _begun(param, grad, slots, options, decoupled)
    beta1, beta2 = options["betas"]
    square = slots["exp_avg_sq"]
    if "max_exp_avg_sq" in slots:
        square = torch.maximum(slots["max_exp_avg_sq"], square)
        slots = {**slots, "max_exp_avg_sq": square}
    scale = root(square) / (1 - beta2 ** slots["step"]) ** 0.5 + options["eps"]
    return param - options["lr"] / (1 - beta1 ** slots["step"]) * (slots["exp_avg"] / scale), slots


adamw = partial(adam, decoupled=True)
"""Loshchilov & Hutter, Decoupled weight decay regularization, ICLR 2019."""


def nadam(param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options) -> Result:
    """Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016."""
    param, grad, slots = _begun(param, grad, slots, options, options.get("decoupled_weight_decay", False))
    (beta1, beta2), lr, step = options["betas"], options["lr"], slots["step"]
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (t * options["momentum_decay"])) for t in (step, step + 1))
    product = slots["mu_product"] * mu
    scale = root(slots["exp_avg_sq"] / (1 - beta2**step)) + options["eps"]
    of_grad, of_mean = lr * (1 - mu) / (1 - product), lr * mu_next / (1 - product * mu_next)
    param = param - of_grad * (grad / scale) - of_mean * (slots["exp_avg"] / scale)
    return param, {**slots, "mu_product": product}


def radam(param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options) -> Result:
    """Liu et al., On the variance of the adaptive learning rate and beyond, ICLR 2020."""
    param, _, slots = _begun(param, grad, slots, options, options.get("decoupled_weight_decay", False))
    (beta1, beta2), lr, step = options["betas"], options["lr"], slots["step"]
    mean, correction = slots["exp_avg"] / (1 - beta1**step), 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction
    if value(length) <= 5.0:  # too few gradients to know their variance
        return param - lr * mean, slots
    fraction = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    scale = root(slots["exp_avg_sq"]) + options["eps"]
    return param - lr * (fraction * correction) ** 0.5 * (mean / scale), slots


def adamax(param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options) -> Result:
    """Kingma & Ba, Adam: a method for stochastic optimization, ICLR 2015, section 7."""
    grad = loss_gradient(param, grad, options)
    (beta1, beta2), step = options["betas"], slots["step"] + 1
    mean = average(slots["exp_avg"], grad, beta1)
    norm = torch.maximum(beta2 * slots["exp_inf"], grad.abs() + options["eps"])
    param = param - options["lr"] / (1 - beta1**step) * (mean / norm)
    return param, {"step": step, "exp_avg": mean, "exp_inf": norm}
