"""Each scheduler of torch gives a training step the options of an ordinary loop."""

import pytest

pytest.importorskip("torch")

import torch
from torch.optim import lr_scheduler

from bilevel_torch.training.schedule import Schedule

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [1, 4]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.1, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=True),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 8),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2), lr_scheduler.ExponentialLR(o, 0.9)]),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
}


def optimizer():
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    return torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.3}], 0.1, momentum=0.9)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("begun", [0, 2])
def test_options_are_those_of_a_loop(make, begun):
    user, other = optimizer(), optimizer()
    scheduler, expected = make(user), make(other)
    for o, s in ((user, scheduler), (other, expected)):
        for _ in range(begun):
            o.step()
            s.step()
    before = str(scheduler.state_dict())
    schedule = Schedule(user, scheduler)
    seen = []
    for _ in range(6):
        seen.append([(group["lr"], group["momentum"]) for group in other.param_groups])
        other.step()
        expected.step()
    for t in (5, *range(6)):  # in any order
        assert [(of["lr"], of["momentum"]) for of in schedule.at(t)] == seen[t]
    assert str(scheduler.state_dict()) == before
    assert schedule.state_dict(6)["_last_lr"] == expected.state_dict()["_last_lr"]


def test_without_a_scheduler_options_are_constant():
    schedule = Schedule(optimizer(), None)
    assert schedule.at(100)[1] == {"lr": 0.3, "momentum": 0.9, "dampening": 0, "weight_decay": 0}
    assert schedule.state_dict(100) is None
