"""`bilevel_torch.data`: weights of training data, the sampler and the report."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import chisquare

pytest.importorskip("torch")

import torch
from torch import nn
from torch.utils.data import DataLoader

import bilevel_torch
from bilevel_torch.data import DataWeights, WeightedSampler, WeightReport

SCORES = torch.tensor([0.5, -1.0, 2.0])


def with_scores(transform="softmax", sizes=None, scores=SCORES):
    weights = DataWeights(len(scores), transform, sizes=sizes)
    with torch.no_grad():
        weights.scores.copy_(scores)
    return weights


def test_all_weights_are_one_at_first():
    for weights in (DataWeights(3), DataWeights(3, "sigmoid"), DataWeights(3, sizes=[1, 2, 5])):
        torch.testing.assert_close(weights(), torch.ones(3))


def test_softmax_has_mean_one_over_sources():
    torch.testing.assert_close(with_scores()(), 3 * SCORES.softmax(0))


def test_softmax_with_sizes_has_mean_one_over_examples():
    source = torch.tensor([0] * 5 + [1] * 2 + [2])
    w = with_scores(sizes=[5, 2, 1])(source).detach()
    assert float(w.mean()) == pytest.approx(1)
    torch.testing.assert_close(w[0] / w[-1], (SCORES[0] - SCORES[2]).exp())


def test_sigmoid_moves_only_the_scores_of_the_batch():
    weights = with_scores("sigmoid")
    w = weights(torch.tensor([2, 2, 0]))
    torch.testing.assert_close(w, 2 * SCORES[[2, 2, 0]].sigmoid())
    w.sum().backward()
    assert weights.scores.grad.nonzero().flatten().tolist() == [0, 2]


def test_weights_of_tokens_have_the_shape_of_their_numbers():
    numbers = torch.tensor([[0, 1, 1], [2, 2, 0]], dtype=torch.int32)
    torch.testing.assert_close(with_scores()(numbers), with_scores()()[numbers.long()])


def test_network_gives_weights_of_features():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 1), torch.randn(5, 4)
    torch.testing.assert_close(DataWeights(net, "sigmoid")(x), 2 * net(x)[:, 0].sigmoid())
    w = DataWeights(net)(x)
    torch.testing.assert_close(w, 5 * net(x)[:, 0].softmax(0))
    assert dict(DataWeights(net).named_parameters()).keys() == {"scores.weight", "scores.bias"}


def test_state_and_dtype_are_those_of_a_module():
    weights = with_scores(sizes=[1, 2, 3])
    assert weights.state_dict().keys() == {"scores"}
    other = DataWeights(3, sizes=[1, 2, 3]).double()
    other.load_state_dict(weights.state_dict())
    assert other().dtype == torch.float64
    torch.testing.assert_close(other().float(), weights())


class Location(nn.Module):
    """L = ½ mean of w (θ − x)², whose minimum is the weighted mean of x."""

    def __init__(self, x, weights, source):
        super().__init__()
        self.theta = nn.Parameter((weights(source) * x).sum().detach() / weights(source).sum().detach())
        self.loss = lambda: 0.5 * (weights(source) * (self.theta - x) ** 2).mean()


@pytest.mark.parametrize("transform", ["softmax", "sigmoid"])
@pytest.mark.parametrize("first_order", [False, True])
def test_hypergradients_are_derivatives_of_the_weighted_mean(transform, first_order):
    """Without a solver: dF/ds by autograd through the closed form of the minimum."""
    torch.manual_seed(0)
    x, source = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    weights = with_scores(transform).double()
    w = weights(source)
    (expected,) = torch.autograd.grad(((w * x).sum() / w.sum() - 1) ** 2, weights.scores)
    net = Location(x, weights, source)

    def outer():
        return (net.theta - 1) ** 2

    if first_order:
        steps = partial(torch.optim.SGD, lr=0.5)
        method = bilevel_torch.FirstOrder(net, weights.parameters(), optimizer=steps, steps=60)
        method.backward(net.loss, outer)
    else:
        bilevel_torch.backward(net.loss(), outer(), net.parameters(), weights.parameters(), solver="exact")
    torch.testing.assert_close(weights.scores.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, "softmx"), ValueError, 'transform: expected .* Did you mean "softmax"'),
        ((0,), ValueError, "scores: expected at least one source or example, got 0"),
        ((2.0,), TypeError, "scores: expected the number of sources or examples, or a module .* got float"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        DataWeights(*arguments)


@pytest.mark.parametrize(
    ("scores", "transform", "sizes", "message"),
    [
        (3, "softmax", [1, 2], "sizes: expected 3 positive numbers"),
        (3, "softmax", [1, 2, 0], "sizes: expected 3 positive numbers"),
        (3, "softmax", {"a": 1, "b": 1, "c": 1}, "sizes: expected 3 positive numbers.*got {'a'"),
        (3, "sigmoid", [1, 2, 3], "sizes: only the softmax of a table"),
    ],
)
def test_wrong_sizes_are_named(scores, transform, sizes, message):
    with pytest.raises(ValueError, match=message):
        DataWeights(scores, transform, sizes=sizes)


def test_wrong_items_are_named():
    weights = DataWeights(3)
    with pytest.raises(IndexError, match="items: expected integers from 0 to 2, got numbers from -100 to 1"):
        weights(torch.tensor([1, -100]))
    with pytest.raises(IndexError, match="from 0 to 2, got numbers from 3 to 3"):
        weights(torch.tensor([3]))
    with pytest.raises(TypeError, match=r"items: expected a tensor of integers .* got a tensor of torch.float32"):
        weights(torch.tensor([1.0]))
    with pytest.raises(TypeError, match="got list"):
        weights([1])
    with pytest.raises(ValueError, match="items: the weights of a module need features"):
        DataWeights(nn.Linear(2, 1))()
    with pytest.raises(ValueError, match=r"scores: the module returned the shape \(4, 2\) for 4 examples"):
        DataWeights(nn.Linear(3, 2))(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="items: the batch has no examples"):
        DataWeights(nn.Linear(3, 1))(torch.zeros(0, 3))


SOURCE = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0])
LOSSES = torch.tensor([1.0, 2.0, 3.0, 0.5, 4.0, 1.5, 2.5, 3.5], dtype=torch.float64)


@pytest.mark.parametrize("uniform", [0.1, 1.0])
def test_mean_of_a_sampled_batch_is_unbiased(uniform):
    """Over all draws: Σ q · loss weight · loss = mean of w · loss, also after the weights have changed."""
    weights = with_scores().double()
    sampler = WeightedSampler(weights, SOURCE, 4, uniform=uniform)
    list(sampler)
    q = sampler.probabilities()
    with torch.no_grad():
        weights.scores.add_(torch.tensor([0.3, 0.9, -0.7]))
    factors = sampler.loss_weights(torch.arange(8))
    expectation, direct = (q * factors * LOSSES).sum(), (weights(SOURCE) * LOSSES).mean()
    torch.testing.assert_close(expectation, direct)
    gradients = [torch.autograd.grad(value, weights.scores)[0] for value in (expectation, direct)]
    torch.testing.assert_close(*gradients)


def test_draws_follow_the_weights():
    weights = with_scores()
    sampler = WeightedSampler(weights, SOURCE, 4000, uniform=0.2, generator=torch.Generator().manual_seed(0))
    w = weights().detach().double()[SOURCE]
    q = 0.8 * w / w.sum() + 0.2 / 8
    counts = np.bincount(list(sampler), minlength=8)
    assert len(sampler) == counts.sum() == 4000
    assert chisquare(counts, 4000 * q.numpy()).pvalue > 0.01


def test_next_iteration_follows_new_weights():
    weights = DataWeights(2)
    sampler = WeightedSampler(weights, torch.tensor([0, 1]), 200, uniform=0.01)
    loader = DataLoader(torch.arange(2), batch_size=200, sampler=sampler)
    with torch.no_grad():
        weights.scores.copy_(torch.tensor([20.0, -20.0]))
    (batch,) = loader
    assert (batch == 0).double().mean() > 0.95
    assert float(sampler.loss_weights(batch).detach().max()) == pytest.approx(2 / (2 * 0.995), rel=1e-3)


def test_sampler_of_a_network():
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    sampler = WeightedSampler(DataWeights(nn.Linear(3, 1), "sigmoid"), x, 5)
    assert sampler.loss_weights(torch.tensor([[0, 1], [2, 3]])).shape == (2, 2)
    with pytest.raises(ValueError, match=r'weights: a module with a softmax .* Construct DataWeights\(module, "sig'):
        WeightedSampler(DataWeights(nn.Linear(3, 1)), x, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "WeightedSampler.num_samples: expected an integer >= 1"),
        ({"uniform": 0}, "WeightedSampler.uniform: expected a finite number > 0"),
        ({"uniform": 1.5}, "WeightedSampler.uniform: expected a part from 0 to 1, got 1.5"),
        ({"items": torch.zeros(2, 2, dtype=torch.long)}, "items: expected one number or row of features"),
    ],
)
def test_wrong_options_of_the_sampler_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        WeightedSampler(
            **{"weights": DataWeights(2), "items": torch.zeros(3, dtype=torch.long), "num_samples": 2} | options
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": torch.ones(2)}, "weights: expected DataWeights, got Tensor"),
        ({"items": None}, "items: expected a tensor .* got NoneType"),
        ({"items": [0, 1]}, "items: expected a tensor .* got list"),
        ({"items": torch.zeros(0, dtype=torch.long)}, "items: expected a tensor .* one or more examples"),
    ],
)
def test_wrong_types_of_the_sampler_are_named(options, message):
    with pytest.raises(TypeError, match=message):
        WeightedSampler(**{"weights": DataWeights(2), "items": torch.zeros(3).long(), "num_samples": 2} | options)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([8]), IndexError, "indices: expected numbers of examples, from 0 to 7, got numbers from 8 to 8"),
        (torch.tensor([-1, 2]), IndexError, "got numbers from -1 to 2"),
        (torch.ones(8, dtype=torch.bool), TypeError, r"indices: .* got a tensor of torch\.bool"),
        ([1], TypeError, "indices: expected a tensor of numbers of examples, got list"),
    ],
)
def test_wrong_indices_are_named(indices, error, message):
    sampler = WeightedSampler(DataWeights(3), SOURCE, 4)
    with pytest.raises(error, match=message):
        sampler.loss_weights(indices)


def test_sampler_needs_a_positive_sum():
    weights = with_scores("sigmoid", scores=torch.full((2,), -200.0))
    with pytest.raises(ValueError, match="weights: the sum of the weights of all examples is 0"):
        WeightedSampler(weights, torch.tensor([0, 1]), 2)


def test_report_sorts_and_shortens():
    texts = ["a  text\nof two lines", "b" * 70, "c", "d", "e"]
    report = WeightReport(torch.tensor([1.0, 3.0, 0.5, 0.25, 0.25]), texts, most=1)
    assert str(report).splitlines() == [
        "5 weights, mean 1.00, effective number 2.4",
        "  weight  name",
        f"    3.00  {'b' * 57}...",
        "     ...  3 more",
        "    0.25  e",
    ]
    assert "    1.00  a text of two lines" in str(WeightReport(report.weights, texts))
    assert str(WeightReport(torch.zeros(2))).splitlines()[0] == "2 weights, mean 0.00, effective number 0.0"


def test_report_draws_its_rows():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    report = WeightReport(with_scores()(), ["books", "forum", r"$\wiki$"])  # no formula
    assert report.plot(ax) is ax
    assert [bar.get_width() for bar in ax.patches] == sorted(report.weights.tolist(), reverse=True)
    assert [label.get_text() for label in ax.get_yticklabels()] == [r"$\wiki$", "books", "forum"]
    FigureCanvasAgg(ax.figure).draw()  # raises an error if it finds a formula
    assert WeightReport(torch.arange(40.0), most=3).plot(Figure().subplots()).patches[3].get_width() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 2),), r"weights: expected a tensor of shape \(n,\), such as .* got Tensor \(2, 2\)"),
        ((torch.tensor([1.0, float("nan")]),), "weights: expected finite numbers >= 0"),
        ((torch.tensor([1.0, -1.0]),), "weights: expected finite numbers >= 0"),
        ((torch.ones(2), ["a"]), "names: expected 2, one for each number, got 1"),
        ((torch.ones(2), None, 0), "most: expected an integer >= 1, got 0"),
    ],
)
def test_wrong_arguments_of_the_report_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightReport(*arguments)
