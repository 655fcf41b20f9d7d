"""Running statistics and other buffers: values of an ordinary loop, derivatives of an outer loss in evaluation mode."""

import pytest

pytest.importorskip("torch")

import copy

import torch
from torch import nn
from torch_training import central, recorded, requiring_gradients, train

from bilevel_torch import TrainingStep

pytestmark = pytest.mark.usefixtures("float64")


class Average(nn.Module):
    """A moving average of the mean input, updated in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        new = x.mean((0, 2))
        if not self.training:
            return x - self.mean[:, None]
        if self.how == "assigned":
            self.mean = 0.8 * self.mean + 0.2 * new
        elif self.how == "in place":
            self.mean.mul_(0.8).add_(0.2 * new)
        elif self.how == "detached":
            self.mean = (0.8 * self.mean + 0.2 * new).detach()
        else:
            with torch.no_grad():
                self.mean.mul_(0.8).add_(0.2 * new)
        return x


def layers():
    return {
        "batch norm": nn.BatchNorm1d(2),
        "momentum None": nn.BatchNorm1d(2, momentum=None),
        "not affine": nn.BatchNorm1d(2, affine=False, momentum=0.4),
        "no statistics": nn.BatchNorm1d(2, track_running_stats=False),
        "frozen": nn.BatchNorm1d(2).eval(),
        "instance norm": nn.InstanceNorm1d(2, track_running_stats=True, affine=True),
        "instance norm without": nn.InstanceNorm1d(2),
        "assigned": Average("assigned"),
        "in place": Average("in place"),
    }


def model_of(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 2), layer, nn.Tanh(), nn.Flatten(), nn.Linear(6, 1))


def loss(model, hparams, batch):
    return (hparams * (model(batch) - batch.sum(2)).square().squeeze(1)).mean() + 0.1 * model(batch).mean()


def evaluated(model, x):
    return (model(x) - 1).square().mean()


@pytest.mark.parametrize("name", layers())
def test_derivatives_and_values_are_those_of_the_loop(name):
    layer = layers()[name]
    model = model_of(layer)
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(5, 1, 4, generator=generator) for _ in range(2)]
    weights, along = torch.ones(5, requires_grad=True), torch.linspace(-1, 2, 5)
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.5), loss, accumulate=2)
    start = requiring_gradients(step.init())
    end = recorded(step, start, weights, [parts] * 3)[-1]
    value = step.evaluate(end, evaluated, parts[0])
    floating = [b for b in start.buffers.values() if b.is_floating_point()]
    inputs = [weights, *start.params.values(), *floating]
    directions = [along, *(torch.ones_like(t) for t in inputs[1:])]
    grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    got = sum((g * u).sum() for g, u in zip(grads, directions, strict=True))

    def moved(size):
        other = copy.deepcopy(model)
        if isinstance(other[1], Average):
            other[1].how = "no_grad"  # as loops without derivatives do
        for tensors in (other.named_parameters(), other.named_buffers()):
            for _, t in tensors:
                if t.is_floating_point():
                    t.data += size
        train(
            other,
            torch.optim.SGD(other.parameters(), 0.1, momentum=0.5),
            [parts] * 3,
            loss=loss,
            hparams=1 + size * along,
        )
        return [evaluated(other.eval(), parts[0]).item()], other

    torch.testing.assert_close(value.item(), moved(0)[0][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(got[None], central(lambda size: moved(size)[0], 1e-4), rtol=1e-6, atol=1e-9)
    plain = step.init()
    for _ in range(3):
        plain = step(plain, torch.ones(5), parts)
    for key, buffer in moved(0)[1].named_buffers():
        for state in (end, plain):
            torch.testing.assert_close(state.buffers[key].detach(), buffer, rtol=1e-12, atol=1e-12)


def test_two_dimensions_and_examples_without_a_batch():
    for layer, shape in [
        (nn.BatchNorm2d(2), (3, 2, 4, 5)),
        (nn.BatchNorm1d(2), (6, 2)),
        (nn.InstanceNorm2d(2, track_running_stats=True), (3, 2, 4, 5)),
        (nn.InstanceNorm2d(2, track_running_stats=True), (2, 4, 5)),
    ]:
        x = torch.randn(shape)
        outer = nn.ModuleList([layer, nn.Linear(1, 1)])

        def of(model, hparams, x):
            return model[0](x).square().mean() + model[1].weight.square().sum()

        step = TrainingStep(outer, torch.optim.SGD(outer.parameters(), 0.0), of)
        end = recorded(step, requiring_gradients(step.init()), None, [x])[0]
        expected = copy.deepcopy(layer).train()
        expected(x)
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(end.buffers[f"0.{name}"].detach(), buffer, rtol=1e-12, atol=1e-12)
        got = step.evaluate(end, lambda model, x: model[0](x), x)
        torch.testing.assert_close(got.detach(), expected.eval()(x).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_a_buffer_without_a_graph_is_named(how):
    model = model_of(Average(how))
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), loss)
    x = torch.randn(5, 1, 4)
    step(step.init(), torch.ones(5), x)  # values need no graph
    text = r"buffer '1\.mean': Average changed it without a graph.*Assign the new value with its graph \(self\.mean = "
    with pytest.raises(TypeError, match=text):
        recorded(step, requiring_gradients(step.init()), torch.ones(5), [x])


def test_the_layers_stay_as_they_are():
    model = model_of(nn.BatchNorm1d(2))
    expected = copy.deepcopy(model)
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), loss)
    x = torch.randn(5, 1, 4)
    recorded(step, requiring_gradients(step.init()), torch.ones(5), [x])
    for way in (nn.Module.train, nn.Module.eval):
        assert torch.equal(way(model)(x), way(expected)(x))
    assert str(model.state_dict()) == str(expected.state_dict())
