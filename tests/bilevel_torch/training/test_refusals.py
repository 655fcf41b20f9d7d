"""Errors of training steps: each names the culprit and the way out."""

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from bilevel_torch import TrainingStep


class Own(torch.optim.Adam):
    """A subclass, whose step may be another."""


def quadratic(model, hparams, batch):
    return model(batch).square().mean()


def new(make=lambda p: torch.optim.SGD(p, 0.1), model=None, loss=quadratic, **options):
    model = nn.Linear(2, 1) if model is None else model
    return TrainingStep(model, make(model.parameters()), loss, **options)


def first(step, batch=None):
    return step(step.init(), {}, torch.ones(3, 2) if batch is None else batch)


OTHERS = {
    "LBFGS": torch.optim.LBFGS,
    "SparseAdam": torch.optim.SparseAdam,
    "Adafactor": torch.optim.Adafactor,
    "Own": Own,
    **({"Muon": lambda p: torch.optim.Muon([next(iter(p))])} if hasattr(torch.optim, "Muon") else {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_are_refused_by_name(name):
    with pytest.raises(
        TypeError, match=rf"no differentiable rule for .*\b{name}\. Use one of torch\.optim \(SGD, .*RMSprop\)"
    ):
        new(OTHERS[name])


def plateau(**options):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return TrainingStep(model, optimizer, quadratic, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


def foreign_scheduler():
    other = torch.optim.SGD(nn.Linear(2, 1).parameters(), 0.1)
    return new(scheduler=torch.optim.lr_scheduler.StepLR(other, 1))


def frozen():
    return new(model=nn.Linear(2, 1).requires_grad_(False))


def tensor_rate():
    return new(lambda p: torch.optim.SGD(p, torch.tensor(0.1, requires_grad=True)))


def parallel():
    model = nn.Linear(2, 1)
    model.__class__ = type("Parallel", (nn.parallel.DistributedDataParallel,), {})  # without processes
    return new(model=model)


def complex_weights():
    return new(model=nn.Linear(2, 1, dtype=torch.complex64))


CONSTRUCTIONS = {
    "plateau": (plateau, TypeError, "ReduceLROnPlateau needs a metric.*Use a scheduler of step numbers"),
    "scheduler": (lambda: new(scheduler=3), TypeError, "scheduler: expected one of torch.optim.lr_scheduler, got int"),
    "foreign scheduler": (foreign_scheduler, ValueError, "scheduler: it belongs to another optimizer"),
    "no optimizer": (lambda: new(list), TypeError, "optimizer: expected an optimizer of torch.optim, got list"),
    "foreign weight": (
        lambda: new(lambda p: torch.optim.SGD([{"params": list(p)}, {"params": [nn.Parameter(torch.ones(4))]}], 0.1)),
        ValueError,
        r"param group 1 has a parameter of shape \(4,\) that is not in the model. Put .*one module",
    ),
    "frozen": (frozen, ValueError, "none of its parameters requires a gradient"),
    "tensor rate": (tensor_rate, ValueError, "param group 0: lr is a tensor that requires a gradient.*`options`"),
    "complex": (complex_weights, TypeError, "weight: complex weights are not supported"),
    "lazy": (lambda: new(model=nn.LazyLinear(1)), ValueError, "weight has no shape yet. Run the model once"),
    "sync": (
        lambda: new(model=nn.Sequential(nn.SyncBatchNorm(2))),
        TypeError,
        "0: the statistics of SyncBatchNorm have no derivative. Use BatchNorm",
    ),
    "parallel": (
        parallel,
        TypeError,
        "model: DistributedDataParallel would not average .* Pass its attribute `module`",
    ),
    "accumulate": (lambda: new(accumulate=0), ValueError, "accumulate: expected a number of micro-batches >= 1, got 0"),
    "limit": (lambda: new(clip_norm=0.0), ValueError, r"clip_norm: expected a number > 0, got 0\.0"),
    "tensor limit": (
        lambda: new(clip_value=torch.ones(())),
        ValueError,
        "clip_value: .*return it from the function `options`",
    ),
    "two limits": (lambda: new(clip_norm=1.0, clip_value=1.0), ValueError, "clip_norm and clip_value: give one"),
}


@pytest.mark.parametrize(("make", "error", "text"), CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_constructions(make, error, text):
    with pytest.raises(error, match=text):
        make()


def with_options(**given):
    return new(options=lambda hparams, t, group: given)


outside = nn.Linear(2, 1)
CALLS = {
    "outside": (
        lambda: first(new(loss=lambda m, h, b: quadratic(outside, h, b))),
        ValueError,
        "does not depend on any weight",
    ),
    "detached": (lambda: first(new(loss=lambda m, h, b: m(b).detach().mean())), ValueError, "loss: it has no graph"),
    "number": (
        lambda: first(new(loss=lambda m, h, b: 1.0)),
        TypeError,
        r"loss: expected a tensor of shape \(\), got float",
    ),
    "vector": (
        lambda: first(new(loss=lambda m, h, b: m(b))),
        ValueError,
        r"loss: .* got shape \(3, 1\)\. Take its mean",
    ),
    "parts": (
        lambda: first(new(accumulate=2), [torch.ones(3, 2)]),
        ValueError,
        r"batch: expected a list of 2 micro-batches \(accumulate=2\), got 1 parts",
    ),
    "no parts": (lambda: first(new(accumulate=2)), ValueError, "a list of 2 micro-batches .*, got Tensor"),
    "no dict": (
        lambda: first(new(options=lambda h, t, g: 0.1)),
        TypeError,
        "options: expected a dict of options for param group 0, got float",
    ),
    "unknown": (lambda: first(with_options(rate=0.1)), ValueError, "no numeric option 'rate'. It has lr, momentum"),
    "flag": (lambda: first(with_options(nesterov=True)), ValueError, "no numeric option 'nesterov'"),
    "momentum": (lambda: first(with_options(momentum=0.5)), ValueError, "param group 0 has no momentum.*other than 0"),
    "both limits": (
        lambda: first(new(clip_norm=1.0, options=lambda h, t, g: {"clip_value": 1.0})),
        ValueError,
        "param group 0 has clip_norm and clip_value. Give one",
    ),
    "shape": (
        lambda: first(with_options(lr=torch.ones(1))),
        TypeError,
        r"options: lr of param group 0: .*shape \(\), got torch.float32 of shape \(1,\)",
    ),
    "type": (
        lambda: first(with_options(lr="0.1")),
        TypeError,
        "lr of param group 0: expected a number or a 0-d tensor, got str",
    ),
    "pair": (
        lambda: first(new(torch.optim.Adam, options=lambda h, t, g: {"betas": 0.9})),
        TypeError,
        r"betas of param group 0: expected a tuple of 2 numbers or 0-d tensors, got 0\.9",
    ),
    "max norm": (
        lambda: first(new(model=nn.Embedding(3, 2, max_norm=0.1)), torch.tensor([1])),
        ValueError,
        r"loss: it changed the weight 'weight' in place, as Embedding\(max_norm.* in the state that the step returns",
    ),
    "sparse": (
        lambda: first(new(model=nn.Embedding(3, 2, sparse=True)), torch.tensor([1])),
        TypeError,
        "weight: its gradient is sparse. Construct the embedding with sparse=False",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), CALLS.values(), ids=CALLS)
def test_calls(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_options_that_changed_since_the_construction():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = TrainingStep(model, optimizer, quadratic)
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(
        ValueError, match=r"optimizer: its options have changed .*'lr': 0\.1.*'lr': 0\.2.* new TrainingStep"
    ):
        step.init()


def test_a_scheduler_that_moved_since_the_construction():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    step = TrainingStep(model, optimizer, quadratic, scheduler=scheduler)
    optimizer.step()
    scheduler.step()
    with pytest.raises(ValueError, match=r"scheduler: it has moved .* Construct a new TrainingStep"):
        step.init()
