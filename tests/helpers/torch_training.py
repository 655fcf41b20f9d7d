"""Runs of a small torch network: by an ordinary loop, and by a `TrainingStep` whose derivative is taken."""

from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from bilevel_torch import TrainingStep

HORIZONS = (1, 4, 8)
EXAMPLES = 8


class Case(NamedTuple):
    """An optimizer with options: ``fixed`` ones, and numbers to differentiate by."""

    cls: Any
    numbers: dict[str, float]
    fixed: Any = MappingProxyType({})
    clip: str | None = None  # the name of a limit in numbers


class Data(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    x_val: torch.Tensor
    y_val: torch.Tensor


def data(zero_column=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x, x_val = (torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    y, y_val = (torch.randn(EXAMPLES, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    if zero_column:
        x[:, 0] = 0
    return Data(*(t.to(dtype) for t in (x, y, x_val, y_val)))


def network(dtype=torch.float64, middle=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), middle or nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def loss(model, hparams, batch):
    x, y, at = batch
    return (hparams["examples"][at] * (model(x) - y).square().squeeze(1)).mean()


def batch_of(d, at=slice(None)):
    return d.x[at], d.y[at], torch.arange(EXAMPLES)[at]


def validation(model, d):
    return (model(d.x_val) - d.y_val).square().mean()


def options_of(numbers):
    """Return options of torch from numbers with one name each."""
    given = {name: number for name, number in numbers.items() if not name.startswith(("clip", "schedule"))}
    for name, parts in {"betas": ("beta1", "beta2"), "etas": ("shrink", "grow"), "step_sizes": ("low", "high")}.items():
        if parts[0] in given:
            given[name] = tuple(given.pop(part) for part in parts)
    return given


def hparams_of(case, numbers=None):
    """Return hparams that require gradients: weights of examples, and the numbers of a case."""
    generator = torch.Generator().manual_seed(5)
    examples = 1 + 0.3 * torch.rand(EXAMPLES, generator=generator, dtype=torch.float64)
    numbers = {name: torch.tensor(n, dtype=torch.float64) for name, n in case.numbers.items()}
    return {name: t.requires_grad_() for name, t in {"examples": examples, **numbers}.items()}


def ordinary(case, model, hparams, d, dtype=torch.float64, horizons=HORIZONS):
    """Return validation losses of a loop as users write it, and the optimizer."""
    numbers = {name: hparams[name].detach().item() for name in case.numbers}
    optimizer = case.cls(model.parameters(), **options_of(numbers), **case.fixed)
    hparams = {"examples": hparams["examples"].detach().to(dtype)}
    losses = []
    for t in range(max(horizons)):
        optimizer.zero_grad()
        loss(model, hparams, batch_of(d)).backward()
        if case.clip == "clip_norm":
            nn.utils.clip_grad_norm_(model.parameters(), numbers["clip_norm"])
        elif case.clip == "clip_value":
            nn.utils.clip_grad_value_(model.parameters(), numbers["clip_value"])
        optimizer.step()
        if t + 1 in horizons:
            losses.append(validation(model, d).item())
    return losses, optimizer


def train(model, optimizer, batches, *, scheduler=None, clip_norm=None, loss=loss, hparams=None):
    """Train a model by a loop as users write it. Each batch is a list of micro-batches."""
    for parts in batches:
        optimizer.zero_grad()
        for part in parts:
            (loss(model, hparams, part) / len(parts)).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def replacing(case):
    """Return a function for ``options`` that takes all numbers of a case from hparams."""

    def options(hparams, t, group):
        numbers = {name: hparams[name] for name in case.numbers}
        return {**options_of(numbers), **({case.clip: numbers[case.clip]} if case.clip else {})}

    return options


def step_of(case, model):
    """Return a step. The optimizer has other numbers than hparams, and the step must not use them."""
    others = options_of({name: 0.9 * number for name, number in case.numbers.items()})
    optimizer = case.cls(model.parameters(), **others, **case.fixed)
    return TrainingStep(model, optimizer, loss, options=replacing(case))


def requiring_gradients(state):
    """Return a state with leaves that require gradients."""
    slots = {name: {key: _leaf(slot) for key, slot in kept.items()} for name, kept in state.optimizer.items()}
    params, buffers = ({name: _leaf(t) for name, t in tensors.items()} for tensors in (state.params, state.buffers))
    return state._replace(params=params, buffers=buffers, optimizer=slots)


def recorded(step, state, hparams, batches):
    """Return the state after each step, with its graph."""
    states = []
    for batch in batches:
        state = step(state, hparams, batch)
        states.append(state)
    return states


def central(function, h):
    """Return the derivatives at 0 of a function with several values, by differences of fourth order."""
    far, near, near_, far_ = (torch.tensor(function(s * h), dtype=torch.float64) for s in (2, 1, -1, -2))
    return (8 * (near - near_) - (far - far_)) / (12 * h)


def _leaf(slot):
    if isinstance(slot, torch.Tensor) and slot.is_floating_point():
        return slot.detach().clone().requires_grad_()
    return slot
