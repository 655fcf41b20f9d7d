"""The update rules of `torch.optim` as differentiable functions."""

import torch

from bilevel_torch.training.rules import adam, descent, squares
from bilevel_torch.training.rules.rule import Options, Rule, Slots

RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: Rule(descent.start_sgd, descent.sgd),
    torch.optim.ASGD: Rule(descent.start_asgd, descent.asgd, fresh=("eta",)),
    torch.optim.Rprop: Rule(descent.start_rprop, descent.rprop, fresh=("step_size",)),
    torch.optim.Adam: Rule(adam.start_adam, adam.adam),
    torch.optim.AdamW: Rule(adam.start_adam, adam.adamw),
    torch.optim.NAdam: Rule(adam.start_nadam, adam.nadam),
    torch.optim.RAdam: Rule(adam.start_adam, adam.radam),
    torch.optim.Adamax: Rule(adam.start_adamax, adam.adamax),
    torch.optim.Adadelta: Rule(squares.start_adadelta, squares.adadelta),
    torch.optim.Adagrad: Rule(squares.start_adagrad, squares.adagrad, fresh=("sum",)),
    torch.optim.RMSprop: Rule(squares.start_rmsprop, squares.rmsprop),
}


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """Return the rule of an optimizer's class.

    Raises:
        TypeError: for any other class, also for a subclass, whose step may be another.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected an optimizer of torch.optim, got {type(optimizer).__name__}.")
    if type(optimizer) not in RULES:
        names = ", ".join(cls.__name__ for cls in RULES)
        raise TypeError(
            f"optimizer: no differentiable rule for {type(optimizer).__module__}.{type(optimizer).__qualname__}. Use "
            f"one of torch.optim ({names}), not a subclass. Or write a step function (state, hparams, batch) -> state."
        )
    return RULES[type(optimizer)]


__all__ = ["RULES", "Options", "Rule", "Slots", "rule_of"]
