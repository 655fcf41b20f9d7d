"""Adadelta, Adagrad and RMSprop, as in `torch.optim`."""

import torch

from bilevel_torch.training.rules.rule import Options, Slots, active, average, loss_gradient, root

Result = tuple[torch.Tensor, Slots]


def start_adadelta(param: torch.Tensor, options: Options) -> Slots:
    """Return averages of zero."""
    return {"step": 0, "square_avg": torch.zeros_like(param), "acc_delta": torch.zeros_like(param)}


def adadelta(param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options) -> Result:
    """Zeiler, Adadelta: an adaptive learning rate method, arXiv:1212.5701, 2012."""
    grad = loss_gradient(param, grad, options)
    rho, eps = options["rho"], options["eps"]
    square = rho * slots["square_avg"] + (1 - rho) * grad * grad
    delta = root(slots["acc_delta"] + eps) / root(square + eps) * grad
    steps = rho * slots["acc_delta"] + (1 - rho) * delta * delta
    return param - options["lr"] * delta, {"step": slots["step"] + 1, "square_avg": square, "acc_delta": steps}


def start_adagrad(param: torch.Tensor, options: Options) -> Slots:
    """Return the sum that the optimizer starts from."""
    return {"step": 0, "sum": torch.full_like(param, options["initial_accumulator_value"])}


def adagrad(param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options) -> Result:
    """Duchi, Hazan & Singer, Adaptive subgradient methods for online learning, JMLR 2011."""
    grad = loss_gradient(param, grad, options)
    before = slots["sum"] if slots["step"] else options["initial_accumulator_value"]
    total = before + grad * grad
    rate = options["lr"] / (1 + slots["step"] * options["lr_decay"])
    return param - rate * (grad / (root(total) + options["eps"])), {"step": slots["step"] + 1, "sum": total}


def start_rmsprop(param: torch.Tensor, options: Options) -> Slots:
    """Return averages of zero, and a buffer of zeros if the optimizer has momentum."""
    names = ["square_avg"]
    names += ["momentum_buffer"] if active(options["momentum"]) else []
    names += ["grad_avg"] if options["centered"] else []
    return {"step": 0, **{name: torch.zeros_like(param) for name in names}}


def rmsprop(param: torch.Tensor, grad: torch.Tensor, slots: Slots, options: Options) -> Result:
    """Tieleman & Hinton, Lecture 6.5: rmsprop, 2012. Centered: Graves, arXiv:1308.0850, 2013."""
    grad = loss_gradient(param, grad, options)
    alpha = options["alpha"]
    square = variance = alpha * slots["square_avg"] + (1 - alpha) * grad * grad
    slots = {**slots, "step": slots["step"] + 1, "square_avg": square}
    if "grad_avg" in slots:
        slots["grad_avg"] = mean = average(slots["grad_avg"], grad, alpha)
        variance = square - mean * mean
    direction = grad / (root(variance) + options["eps"])
    if "momentum_buffer" in slots:
        slots["momentum_buffer"] = direction = options["momentum"] * slots["momentum_buffer"] + direction
    return param - options["lr"] * direction, slots
