"""Training steps of whole loops: schedules, clipping, micro-batches, groups, frozen and tied weights, states."""

import pytest

pytest.importorskip("torch")

import copy

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch_training import (
    EXAMPLES,
    Case,
    batch_of,
    central,
    data,
    hparams_of,
    loss,
    network,
    recorded,
    requiring_gradients,
    train,
    validation,
)

from bilevel_torch import TrainingStep
from bilevel_torch.training.recording import without_graph

pytestmark = pytest.mark.usefixtures("float64")
EXAMPLE_WEIGHTS = {"examples": torch.ones(EXAMPLES, dtype=torch.float64)}


def derivative(step, state, hparams, batches, names, d):
    """Return derivatives of the validation loss of a run."""
    state = recorded(step, requiring_gradients(state), hparams, batches)[-1]
    return torch.autograd.grad(step.evaluate(state, validation, d), [hparams[name] for name in names])


def run(step, steps, batch, hparams=EXAMPLE_WEIGHTS, state=None):
    state = step.init() if state is None else state
    for _ in range(steps):
        state = step(state, hparams, batch)
    return state


def assert_params(state, model):
    for name, param in model.named_parameters():
        if name in state.params:
            torch.testing.assert_close(state.params[name], param.detach(), rtol=1e-11, atol=1e-12)


def test_adamw_with_cosine_schedule_clipping_and_micro_batches():
    numbers = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.02, "weight_decay": 0.1, "clip_norm": 0.3}
    d, hparams, model = data(), hparams_of(Case(None, numbers)), network()
    micro = [batch_of(d, slice(0, 4)), batch_of(d, slice(4, 8))]

    def begin(model, n):
        beta, other = n["beta1"], {name: n[name] for name in ("lr", "eps", "weight_decay")}
        optimizer = torch.optim.AdamW(model.parameters(), betas=(beta, n["beta2"]), **other)
        return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 6, eta_min=0.01)

    def options(hparams, t, group):
        assert group["clip_norm"] == 5.0
        # Cosine annealing is linear in the first rate.
        fraction = (group["lr"] - 0.01) / (0.1 - 0.01)
        betas = hparams["beta1"], hparams["beta2"]
        lr = 0.01 + fraction * (hparams["lr"] - 0.01)
        return {"lr": lr, "betas": betas, **{n: hparams[n] for n in ("eps", "weight_decay", "clip_norm")}}

    optimizer, scheduler = begin(model, numbers)
    step = TrainingStep(model, optimizer, loss, scheduler=scheduler, clip_norm=5.0, accumulate=2, options=options)
    got = derivative(step, step.init(), hparams, [micro] * 6, list(hparams), d)

    def ordinary(now):
        other = copy.deepcopy(model)
        values = {name: now[name].item() for name in numbers}
        optimizer, scheduler = begin(other, values)
        train(other, optimizer, [micro] * 6, scheduler=scheduler, clip_norm=values["clip_norm"], hparams=now)
        return other

    plain = {name: t.detach() for name, t in hparams.items()}
    assert_params(run(step, 6, micro, plain), ordinary(plain))
    for (name, t), grad in zip(plain.items(), got, strict=True):
        along = torch.linspace(-1, 1, EXAMPLES) if t.dim() else torch.ones(())
        expected = central(
            lambda s, n=name, a=along: [validation(ordinary({**plain, n: plain[n] + s * a}), d).item()], 1e-5
        )
        torch.testing.assert_close(
            (grad * along).sum()[None], expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: n + m
        )


def test_parameters_of_a_schedule_are_hyperparameters():
    d, model = data(), network()
    hparams = {
        "decay": torch.tensor(0.7, requires_grad=True),
        "warmup": torch.tensor(3.0, requires_grad=True),
        "examples": torch.ones(EXAMPLES),
    }

    def rate(hparams, t):
        return 0.2 * hparams["decay"] ** t * (1 - 0.5 ** (1 + t / hparams["warmup"]))

    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.5)
    step = TrainingStep(model, optimizer, loss, options=lambda hparams, t, group: {"lr": rate(hparams, t)})
    got = derivative(step, step.init(), hparams, [batch_of(d)] * 5, ["decay", "warmup"], d)
    for name, grad in zip(["decay", "warmup"], got, strict=True):

        def moved(size, name=name):
            other, now = copy.deepcopy(model), {n: t.detach() for n, t in hparams.items()}
            now[name] = now[name] + size
            optimizer = torch.optim.SGD(other.parameters(), 1.0, momentum=0.5)
            schedule = lr_scheduler.LambdaLR(optimizer, lambda t: rate(now, t).item())
            train(other, optimizer, [[batch_of(d)]] * 5, scheduler=schedule, hparams=now)
            return [validation(other, d).item()]

        torch.testing.assert_close(grad[None], central(moved, 1e-4), rtol=1e-6, atol=1e-9)


def test_groups_have_their_own_options_and_one_norm():
    d, model = data(), network()

    def groups(model):
        return [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "weight_decay": 0.2}]

    step = TrainingStep(model, torch.optim.SGD(groups(model), 0.05, momentum=0.5), loss, clip_norm=0.4)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(groups(expected), 0.05, momentum=0.5)
    train(expected, optimizer, [[batch_of(d)]] * 4, clip_norm=0.4, hparams=EXAMPLE_WEIGHTS)
    assert_params(run(step, 4, batch_of(d)), expected)


def test_options_of_one_group_are_differentiated():
    d, model = data(), network()
    hparams = {"lr": torch.tensor(0.1, requires_grad=True), "examples": torch.ones(EXAMPLES)}
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "lr": 0.1}]

    def options(hparams, t, group):
        assert group["lr"] == [0.3, 0.1][group["index"]]
        return {**group, "lr": hparams["lr"]} if group["index"] == 1 else {}

    step = TrainingStep(model, torch.optim.Adam(groups, eps=0.1), loss, options=options)
    (got,) = derivative(step, step.init(), hparams, [batch_of(d)] * 3, ["lr"], d)

    def moved(size):
        state = run(step, 3, batch_of(d), {**hparams, "lr": hparams["lr"].detach() + size})
        return [step.evaluate(state, validation, d).item()]

    torch.testing.assert_close(got[None], central(moved, 1e-4), rtol=1e-6, atol=1e-9)


class Tied(nn.Module):
    """A network with a tied weight, a weight that no loss uses, and a penalty as a method."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def penalty(self):
        return 0.1 * self.first.weight.square().sum()


def penalized(model, hparams, batch):
    return loss(model, hparams, batch) + model.penalty() + 0.1 * model.last.weight.abs().sum()


def test_tied_frozen_and_unused_weights():
    d, model = data(), Tied()
    model.second.bias.requires_grad_(False)
    step = TrainingStep(model, torch.optim.AdamW(model.parameters(), 0.05), penalized)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(expected.parameters(), 0.05)
    train(expected, optimizer, [[batch_of(d)]] * 4, loss=penalized, hparams=EXAMPLE_WEIGHTS)
    state = run(step, 4, batch_of(d))
    assert_params(state, expected)
    assert set(state.params) == {"first.weight", "first.bias", "last.weight", "last.bias", "unused"}
    # AdamW decays only weights with a gradient.
    assert torch.equal(state.params["unused"], torch.ones(2))
    assert state.optimizer["unused"]["step"] == 0
    step.load(state)
    assert model.second.weight is model.first.weight
    assert_params(state, model)


def test_the_model_the_optimizer_and_the_scheduler_stay():
    d, model = data(), network()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    step = TrainingStep(model, optimizer, loss, scheduler=scheduler)
    state = step.init()
    copies = copy.deepcopy(state)
    run(step, 3, batch_of(d), state=state)
    after = [model.state_dict(), optimizer.state_dict(), scheduler.state_dict()]
    assert str(before) == str(after)
    assert str(copies) == str(state)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("begun", [0, 3])
def test_a_state_can_be_loaded_and_training_continues(begun):
    d, model = data(), network(middle=nn.BatchNorm1d(3))

    def begin(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, dampening=0.2)
        warmup, decay = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)
        return optimizer, lr_scheduler.SequentialLR(optimizer, [warmup, decay], [3])

    expected = copy.deepcopy(model)
    optimizer, scheduler = begin(model)
    train(model, optimizer, [[batch_of(d)]] * begun, scheduler=scheduler, hparams=EXAMPLE_WEIGHTS)
    step = TrainingStep(model, optimizer, loss, scheduler=scheduler)
    state = run(step, 4, batch_of(d))
    assert state.step == 4
    step.load(state)
    again = step.init()
    assert str(again) == str(state)
    train(model, optimizer, [[batch_of(d)]] * 2, scheduler=scheduler, hparams=EXAMPLE_WEIGHTS)
    other, ordinary = begin(expected)
    train(expected, other, [[batch_of(d)]] * (begun + 6), scheduler=ordinary, hparams=EXAMPLE_WEIGHTS)
    for got, want in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert scheduler.get_last_lr() == pytest.approx(ordinary.get_last_lr(), rel=1e-12)


def test_each_step_has_the_mode_of_the_construction():
    d, model = data(), network(middle=nn.BatchNorm1d(3))
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), loss)
    expected = run(step, 2, batch_of(d))
    model.eval()
    assert str(run(step, 2, batch_of(d))) == str(expected)
    assert not model.training
    model.train()
    assert step.evaluate(expected, lambda model: model[1].training) is False
    assert model[1].training


def test_dropout_follows_the_seed():
    d, model = data(), network(middle=nn.Dropout(0.5))
    step = TrainingStep(model, torch.optim.Adam(model.parameters(), 0.1, eps=0.1), loss)
    hparams = {"examples": torch.ones(EXAMPLES, requires_grad=True)}

    def seeded():
        torch.manual_seed(4)
        return step.init()

    got = derivative(step, seeded(), hparams, [batch_of(d)] * 4, ["examples"], d)[0]
    along = torch.linspace(-1, 1, EXAMPLES)

    def moved(size):
        state = run(step, 4, batch_of(d), {"examples": torch.ones(EXAMPLES) + size * along}, seeded())
        return [step.evaluate(state, validation, d).item()]

    torch.testing.assert_close((got * along).sum()[None], central(moved, 1e-4), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("context", [torch.no_grad, without_graph])
def test_without_recording_no_graph_crosses_a_step(context):
    d, model = data(), network()
    step = TrainingStep(model, torch.optim.Adam(model.parameters()), loss)
    hparams = {"examples": torch.ones(EXAMPLES, requires_grad=True)}
    with context():
        state = step(requiring_gradients(step.init()), hparams, batch_of(d))
    assert not any(
        t.requires_grad for t in [*state.params.values(), *state.optimizer["0.bias"].values()] if torch.is_tensor(t)
    )


def test_a_whole_gradient_of_zero_has_the_derivative_of_the_update():
    """All gradients and moments are zero: dw' / dw = 1 for each weight, and clipping changes nothing."""
    model = nn.Linear(2, 1, bias=False)
    step = TrainingStep(
        model, torch.optim.Adam(model.parameters(), 0.1), lambda m, h, x: (m(x) ** 2).sum(), clip_norm=1.0
    )
    start = requiring_gradients(step.init())
    end = recorded(step, start, None, [torch.zeros(3, 2)] * 2)[-1]
    (got,) = torch.autograd.grad(end.params["weight"].sum(), start.params["weight"])
    assert torch.equal(got, torch.ones(1, 2))


def test_the_first_step_is_compared_with_the_optimizer(monkeypatch):
    d, model = data(), network()
    step = TrainingStep(model, torch.optim.Adam(model.parameters()), loss)
    original = torch.optim.Adam.step

    def twice(self, closure=None):
        original(self, closure)
        original(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", twice)
    with pytest.raises(
        RuntimeError, match=r"Adam: the differentiable rule and the optimizer of torch .* differ by 0\.001"
    ):
        step(step.init(), EXAMPLE_WEIGHTS, batch_of(d))


def test_the_comparison_takes_options_that_are_tensors():
    d, model = data(), network()
    names = ("lr", "eps")
    hparams = {**EXAMPLE_WEIGHTS, "lr": torch.tensor(0.3), "eps": torch.tensor(0.1), "beta": torch.tensor(0.5)}

    def options(hparams, t, group):
        return {**{n: hparams[n] for n in names}, "betas": (hparams["beta"], 0.9)}

    optimizer = torch.optim.Adam(model.parameters(), capturable=False, foreach=True)
    state = run(TrainingStep(model, optimizer, loss, options=options), 1, batch_of(d), hparams)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.Adam(expected.parameters(), 0.3, (0.5, 0.9), 0.1)
    train(expected, optimizer, [[batch_of(d)]], hparams=EXAMPLE_WEIGHTS)
    assert_params(state, expected)
