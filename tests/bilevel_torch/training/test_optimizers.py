"""Each optimizer of torch: values of an ordinary loop, and derivatives against central differences of that loop."""

import pytest

pytest.importorskip("torch")

import copy

import torch
from torch_training import (
    HORIZONS,
    Case,
    batch_of,
    central,
    data,
    hparams_of,
    loss,
    network,
    ordinary,
    recorded,
    requiring_gradients,
    step_of,
    validation,
)

from bilevel_torch import TrainingStep

SGD, Adam, AdamW, NAdam, RAdam = (getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam"))
ADAM = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 0.02}
MOMENTUM = {"lr": 0.05, "momentum": 0.8}
RMS = {"lr": 0.03, "alpha": 0.8, "eps": 0.05}

CASES = {
    "sgd": Case(SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd maximize": Case(SGD, {"lr": 0.05, "weight_decay": 0.1}, {"maximize": True}),
    "sgd momentum": Case(SGD, {**MOMENTUM, "weight_decay": 0.1}),
    "sgd dampening": Case(SGD, {**MOMENTUM, "dampening": 0.3}),
    "sgd momentum maximize": Case(SGD, {**MOMENTUM, "dampening": 0.3}, {"maximize": True}),
    "sgd nesterov": Case(SGD, MOMENTUM, {"nesterov": True}),
    "adam": Case(Adam, ADAM),
    "adam maximize": Case(Adam, ADAM, {"maximize": True}),
    "adam decay": Case(Adam, {**ADAM, "weight_decay": 0.1}),
    "adam amsgrad": Case(Adam, ADAM, {"amsgrad": True}),
    "adam decoupled": Case(Adam, {**ADAM, "weight_decay": 0.1}, {"decoupled_weight_decay": True}),
    "adamw": Case(AdamW, {**ADAM, "weight_decay": 0.1}),
    "adamw amsgrad": Case(AdamW, {**ADAM, "weight_decay": 0.1}, {"amsgrad": True}),
    "nadam": Case(NAdam, {**ADAM, "momentum_decay": 0.1}),
    "nadam decay": Case(NAdam, {**ADAM, "weight_decay": 0.1}),
    "nadam decoupled": Case(NAdam, {**ADAM, "weight_decay": 0.1}, {"decoupled_weight_decay": True}),
    "radam": Case(RAdam, {**ADAM, "beta2": 0.95}),
    "radam decay": Case(RAdam, {**ADAM, "beta2": 0.95, "weight_decay": 0.1}),
    "radam decoupled": Case(RAdam, {**ADAM, "beta2": 0.95, "weight_decay": 0.1}, {"decoupled_weight_decay": True}),
    "adamax": Case(torch.optim.Adamax, {**ADAM, "weight_decay": 0.1}),
    "adamax no decay": Case(torch.optim.Adamax, ADAM),
    "adadelta": Case(torch.optim.Adadelta, {"lr": 1.0, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1}),
    "adagrad": Case(torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "eps": 0.02}),
    "adagrad start": Case(torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1}),
    "rmsprop": Case(torch.optim.RMSprop, RMS),
    "rmsprop decay": Case(torch.optim.RMSprop, {**RMS, "weight_decay": 0.1}),
    "rmsprop momentum": Case(torch.optim.RMSprop, {**RMS, "momentum": 0.5}),
    "rmsprop centered": Case(torch.optim.RMSprop, {**RMS, "momentum": 0.5}, {"centered": True}),
    "asgd": Case(torch.optim.ASGD, {"lr": 0.1, "lambd": 0.05, "alpha": 0.7, "t0": 1.5, "weight_decay": 0.1}),
    "rprop": Case(torch.optim.Rprop, {"lr": 0.02, "shrink": 0.5, "grow": 1.2, "low": 0.013, "high": 0.03}),
    "clip norm": Case(Adam, {**ADAM, "clip_norm": 0.2}, clip="clip_norm"),
    "no clip norm": Case(SGD, {**MOMENTUM, "clip_norm": 100.0}, clip="clip_norm"),
    "clip value": Case(SGD, {**MOMENTUM, "clip_value": 0.1}, clip="clip_value"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("zero_column", [False, True], ids=["", "zero gradients"])
@pytest.mark.usefixtures("float64")
def test_derivatives_are_central_differences_of_the_loop(case, zero_column):
    d, hparams, model = data(zero_column), hparams_of(case), network()
    step = step_of(case, model)
    start = requiring_gradients(step.init())
    states = recorded(step, start, hparams, [batch_of(d)] * max(HORIZONS))
    inputs = {**start.params, **hparams}
    grads = [
        torch.autograd.grad(
            step.evaluate(states[n - 1], validation, d),
            list(inputs.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for n in HORIZONS
    ]
    generator = torch.Generator().manual_seed(7)
    for names in [list(start.params), *([name] for name in hparams)]:
        along = {
            n: torch.randn(inputs[n].shape, generator=generator) if inputs[n].dim() else torch.ones(()) for n in names
        }

        def moved(size, along=along):
            with torch.no_grad():
                now = {n: t + size * along[n] if n in along else t for n, t in inputs.items()}
                other = copy.deepcopy(model)
                for name, param in other.named_parameters():
                    param.copy_(now[name])
            return ordinary(case, other, now, d)[0]

        expected = central(moved, 1e-4 * min(1.0, abs(inputs[names[0]].detach()).max().item()))
        got = torch.stack([sum((dict(zip(inputs, g, strict=True))[n] * along[n]).sum() for n in names) for g in grads])
        torch.testing.assert_close(
            got, expected, rtol=1e-6, atol=1e-9, msg=lambda text, names=names: f"{names}: {text}"
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_values_are_those_of_the_loop(case, dtype, request):
    if dtype == torch.float64:
        request.getfixturevalue("float64")
    d, model = data(dtype=dtype), network(dtype)
    hparams = {name: t.detach().to(dtype) if t.dim() else t.detach() for name, t in hparams_of(case).items()}
    step = step_of(case, model)
    state = step.init()
    for _ in range(max(HORIZONS)):
        state = step(state, hparams, batch_of(d))
    other = copy.deepcopy(model)
    _, optimizer = ordinary(case, other, hparams, d, dtype)
    rtol = 2e-5 if dtype == torch.float32 else 1e-12
    for name, param in other.named_parameters():
        assert state.params[name].dtype == dtype
        torch.testing.assert_close(state.params[name], param.detach(), rtol=rtol, atol=rtol)
        for key, kept in optimizer.state[param].items():
            got = torch.as_tensor(state.optimizer[name][key], dtype=kept.dtype)
            torch.testing.assert_close(got, kept, rtol=10 * rtol, atol=10 * rtol)


@pytest.mark.usefixtures("float64")
def test_the_average_of_asgd_is_differentiable():
    case, d = CASES["asgd"], data()
    hparams, model = hparams_of(case), network()
    step = step_of(case, model)
    state = recorded(step, step.init(), hparams, [batch_of(d)] * 6)[-1]
    names = [*case.numbers]
    averages = {name: slots["ax"] for name, slots in state.optimizer.items()}
    value = step.evaluate(state._replace(params=averages), validation, d)
    got = torch.autograd.grad(value, [hparams[name] for name in names])
    for name, derivative in zip(names, got, strict=True):

        def moved(size, name=name):
            other = copy.deepcopy(model)
            _, optimizer = ordinary(case, other, {**hparams, name: hparams[name].detach() + size}, d, horizons=(6,))
            with torch.no_grad():
                for param in other.parameters():
                    param.copy_(optimizer.state[param]["ax"])
            return [validation(other, d).item()]

        torch.testing.assert_close(derivative[None], central(moved, 1e-4), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["sgd dampening", "adamw amsgrad", "nadam", "rprop", "asgd", "adagrad start"])
@pytest.mark.usefixtures("float64")
def test_a_run_that_has_begun_continues(name):
    case, d, model = CASES[name], data(), network()
    hparams = hparams_of(case)
    _, optimizer = ordinary(case, model, hparams, d, horizons=(3,))
    step = TrainingStep(model, optimizer, loss)  # with the optimizer's own options
    state = step.init()
    for _ in range(4):
        state = step(state, {"examples": hparams["examples"].detach()}, batch_of(d))
    expected = network()
    ordinary(case, expected, hparams, d, horizons=(7,))
    for key, param in expected.named_parameters():
        torch.testing.assert_close(state.params[key], param.detach(), rtol=1e-12, atol=1e-12)
