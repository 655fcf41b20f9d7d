"""Checkpoints inside the model: values are right, and derivatives that would be wrong raise an error."""

import pytest

pytest.importorskip("torch")

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_training import EXAMPLES, batch_of, data, loss, recorded, requiring_gradients, train, validation

from bilevel_torch import TrainingStep

pytestmark = pytest.mark.usefixtures("float64")


class Checkpointed(nn.Module):
    """A network that keeps no activations of its first layers."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.how = nn.Linear(3, 4), nn.Linear(4, 1), how

    def hidden(self, x):
        """Run no module in the second case."""
        return torch.tanh(self.first(x) if self.how == "module" else x @ self.first.weight.T + self.first.bias).tanh()

    def forward(self, x):
        if self.how == "training" and not self.training:
            return self.last(self.hidden(x))
        return self.last(self.hidden(x) if self.how is None else checkpoint(self.hidden, x, use_reentrant=False))


def new(how):
    model = Checkpointed(how)
    return model, TrainingStep(model, torch.optim.SGD(model.parameters(), 0.3), loss)


@pytest.mark.parametrize("how", ["module", "function", "training"])
def test_values_are_those_of_the_loop(how):
    d, hparams = data(), {"examples": torch.ones(EXAMPLES)}
    model, step = new(how)
    state = step.init()
    for _ in range(3):
        state = step(state, hparams, batch_of(d))
    expected = copy.deepcopy(model)
    train(expected, torch.optim.SGD(expected.parameters(), 0.3), [[batch_of(d)]] * 3, hparams=hparams)
    for name, param in expected.named_parameters():
        torch.testing.assert_close(state.params[name], param.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["module", "function", "training"])
def test_a_recorded_step_raises(how):
    d, hparams = data(), {"examples": torch.ones(EXAMPLES, requires_grad=True)}
    _, step = new(how)
    with pytest.raises(RuntimeError, match=r"loss: its backward pass computes a part of the model again.* Turn off"):
        recorded(step, requiring_gradients(step.init()), hparams, [batch_of(d)])


@pytest.mark.parametrize("how", ["module", "function"])
def test_an_outer_loss_raises(how):
    d, hparams = data(), {"examples": torch.ones(EXAMPLES)}
    model, step = new(None)
    state = recorded(step, requiring_gradients(step.init()), hparams, [batch_of(d)])[0]
    model.how = how
    with pytest.raises(RuntimeError, match="function: its backward pass computes a part of the model again"):
        step.evaluate(state, validation, d)
    with torch.no_grad():
        step.evaluate(state, validation, d)


def test_a_loss_of_nan_is_no_checkpoint():
    d, hparams = data(), {"examples": torch.full((EXAMPLES,), float("nan"))}
    _, step = new(None)
    state = recorded(step, requiring_gradients(step.init()), hparams, [batch_of(d)])[0]
    assert state.params["last.bias"].isnan().all()


class Once(torch.autograd.Function):
    """A square whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_a_hidden_second_derivative_is_named():
    model = nn.Linear(2, 1)
    step = TrainingStep(
        model, torch.optim.SGD(model.parameters(), 0.1), lambda m, h, b: (Once.apply(m(b)) + m(b) ** 2).mean()
    )
    step(step.init(), None, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="Once"):
        recorded(step, requiring_gradients(step.init()), None, [torch.ones(3, 2)])
