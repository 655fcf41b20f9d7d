"""SGD, ASGD and Rprop, as in `torch.optim`."""

import torch

from bilevel_torch.training.rules.rule import Options, Slots, active, clamp, loss_gradient, scalar, value


def start_sgd(param: torch.Tensor, options: Options) -> Slots:
    """Return a buffer of zeros if the optimizer has momentum. The first update replaces it, and sets ``step`` to 1."""
    return {"step": 0, "momentum_buffer": torch.zeros_like(param)} if active(options["momentum"]) else {}


def sgd(param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options) -> tuple[torch.Tensor, Slots]:
    """Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013."""
    grad = loss_gradient(param, grad, options)
    if slots:
        momentum = options["momentum"]
        # The first gradient enters the buffer without dampening.
        dampened = (1 - options["dampening"]) * grad
        buffer = momentum * slots["momentum_buffer"] + dampened if slots["step"] else grad
        slots = {"step": 1, "momentum_buffer": buffer}
        grad = grad + momentum * buffer if options["nesterov"] else buffer
    lr = options["lr"]
    # One operation in place of two, if the rate has no derivative.
    return param - lr * grad if isinstance(lr, torch.Tensor) else torch.sub(param, grad, alpha=lr), slots


def start_asgd(param: torch.Tensor, options: Options) -> Slots:
    """Return a rate of lr, and an average of zero that the first update replaces."""
    eta, mu = scalar(param, options["lr"]), scalar(param, 1.0)
    return {"step": 0, "eta": eta, "mu": mu, "ax": torch.zeros_like(param)}


def asgd(param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options) -> tuple[torch.Tensor, Slots]:
    """Polyak & Juditsky, Acceleration of stochastic approximation by averaging, 1992. ``ax`` is the average."""
    grad = loss_gradient(param, grad, options)
    lr, lambd, step = options["lr"], options["lambd"], slots["step"] + 1
    eta, mu = slots["eta"] if slots["step"] else lr, slots["mu"]
    param = param * (1 - lambd * eta) - eta * grad
    average = slots["ax"] + mu * (param - slots["ax"])
    gap = step - options["t0"]
    after = {"eta": lr / (1 + lambd * lr * step) ** options["alpha"], "mu": 1 / gap if value(gap) > 1 else 1.0}
    scalars = {name: number + torch.zeros_like(slots[name]) for name, number in after.items()}
    return param, {"step": step, **scalars, "ax": average}


def start_rprop(param: torch.Tensor, options: Options) -> Slots:
    """Return steps of lr."""
    return {"step": 0, "prev": torch.zeros_like(param), "step_size": torch.full_like(param, options["lr"])}


def rprop(param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options) -> tuple[torch.Tensor, Slots]:
    """Riedmiller & Braun, A direct adaptive method for faster backpropagation learning: the RPROP algorithm, 1993.

    The update depends on the signs of gradients only. So its derivative by the gradient is zero.
    """
    grad = loss_gradient(param, grad.detach(), options, decay=False)
    (shrink, grow), (low, high) = options["etas"], options["step_sizes"]
    ones, agreement = torch.ones_like(param), grad * slots["prev"]
    factor = torch.where(agreement > 0, grow * ones, torch.where(agreement < 0, shrink * ones, ones))
    before = slots["step_size"] if slots["step"] else options["lr"] * ones
    size = clamp(before * factor, low, high)
    grad = torch.where(agreement < 0, torch.zeros_like(grad), grad)
    return param - grad.sign() * size, {"step": slots["step"] + 1, "prev": grad, "step_size": size}
