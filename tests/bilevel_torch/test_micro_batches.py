"""Micro-batches from a DataLoader, with losses that run a module."""

import weakref
from typing import ClassVar

import pytest
from frameworks import relative_error

import bilevel as bl

torch = pytest.importorskip("torch")
F = torch.nn.functional


@pytest.fixture(params=["module", "functional_call"])
def setting(request):
    """A problem with a weight per example, whose losses run a module with its own weights or with the given ones."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x, y = torch.randn(11, 3, dtype=torch.float64), torch.randint(2, (11,))

    def run(params, x):
        return net(x) if request.param == "module" else torch.func.functional_call(net, params, (x,))

    def inner(params, weights, x, y, index):
        losses = F.cross_entropy(run(params, x), y, reduction="none")
        return (weights[index].exp() * losses).mean() + 0.1 * sum((p**2).sum() for p in params.values())

    def outer(params, weights, x, y, index):
        return F.cross_entropy(run(params, x), y)

    weights = torch.randn(11, dtype=torch.float64)
    return bl.Problem(inner, outer), dict(net.named_parameters()), weights, (x, y, torch.arange(11))


def hypergradient(setting, args, solver="minres"):
    problem, params, weights, _ = setting
    options = {"solver": {"name": solver, "rtol": 1e-12, "damping": 0.5}, "on_failure": "raise"}
    return bl.hypergradient(problem, params, weights, inner_args=args, outer_args=args, **options)


@pytest.mark.filterwarnings("ignore::bilevel.InnerProblemWarning")
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_data_loader(setting, shuffle):
    """Shuffling changes the order of the sum only, since each example brings its index."""
    data = torch.utils.data.TensorDataset(*setting[3])
    generator = torch.Generator().manual_seed(1)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=shuffle, generator=generator)
    found, expected = hypergradient(setting, bl.MicroBatches(loader)), hypergradient(setting, setting[3])
    assert relative_error(found.grad, expected.grad) <= 1e-10
    assert relative_error(found.value, expected.value) <= 1e-12


@pytest.mark.filterwarnings("ignore::bilevel.InnerProblemWarning")
def test_a_loader_that_drops_other_examples_in_each_pass_is_refused(setting):
    data = torch.utils.data.TensorDataset(*setting[3])
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    with pytest.raises(ValueError, match="without drop_last=True where it shuffles"):
        hypergradient(setting, bl.MicroBatches(loader))


@pytest.mark.filterwarnings("ignore::bilevel.InnerProblemWarning")
def test_dropout_is_refused():
    w, h = torch.ones(8, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    problem = bl.Problem(
        lambda w, h, x: F.dropout(x @ w).mean() + (h.exp() * w**2).sum(), lambda w, h, x: (x @ w).mean()
    )
    args = bl.MicroBatches((torch.randn(12, 8, dtype=torch.float64),), size=4)
    with pytest.raises(ValueError, match=r"Use eval\(\) to turn off dropout"):
        bl.hypergradient(problem, w, h, inner_args=args, outer_args=args)


class Square(torch.autograd.Function):
    """x², with a mark that lives as long as the graph."""

    marks: ClassVar = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.mark = Mark()
        Square.marks.add(ctx.mark)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Mark:
    pass


@pytest.mark.filterwarnings("ignore::bilevel.InnerProblemWarning")
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_only_one_graph_is_alive_at_a_time(curvature):
    """When a micro-batch runs forward, the graph of the one before is gone, without a garbage collection."""
    alive = []

    def model(w, h, x):
        alive.append(len(Square.marks))
        return Square.apply(x @ w["A"]) @ w["b"] * h.exp()

    def outer(w, h, x, y):
        return F.mse_loss(model(w, h, x), y)

    torch.manual_seed(0)
    w = {"A": torch.randn(3, 4, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    h = torch.zeros((), dtype=torch.float64)
    problem = bl.Problem.from_model(model, F.mse_loss, outer, curvature=curvature)
    args = bl.MicroBatches((torch.randn(12, 3, dtype=torch.float64), torch.randn(12, dtype=torch.float64)), size=2)
    hg = bl.hypergradient(problem, w, h, inner_args=args, outer_args=args, solver=bl.MINRES(damping=1.0))
    assert hg.info.steps > 1
    assert len(alive) > 6 * hg.info.steps
    assert max(alive) == 0
