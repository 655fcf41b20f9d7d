"""Frozen parameters among the params of `bilevel_torch.hypergradient`: constants, for which no memory is kept."""

import copy
import io

import pytest

import bilevel as bl
from bilevel.spaces.tree import leaves

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
nn = torch.nn

SOLVERS = ["cg", "minres", "neumann", "nystrom", "gmres", "exact"]
X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)


@pytest.fixture
def loop():
    """Return a net whose first layer is frozen, a hyperparameter, and the function that computes the losses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    net[0].requires_grad_(False)
    net[4].bias.requires_grad_(False)
    decay = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def losses():
        penalty = decay.exp() * sum((p**2).sum() for p in net.parameters())
        return (net(X) - 1).pow(2).mean() + penalty, net(X).pow(2).mean()

    return net, decay, losses


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def size(tree):
    return sum(t.numel() for t in leaves(tree))


def stored(state):
    file = io.BytesIO()
    torch.save(state, file)
    return len(file.getvalue())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")  # results are compared, not judged
def test_results_and_states_are_the_same_as_without_them(loop, solver):
    net, decay, losses = loop
    found = {}
    for name, params in (("all", list(net.parameters())), ("trained", trained(net))):
        warm = bl.WarmStart({"name": solver, "damping": 1.0}, prepare_every=5)
        hgs = [bilevel_torch.hypergradient(*losses(), params, decay, solver=warm) for _ in range(2)]
        found[name] = [hg.grad for hg in hgs], hgs[1].info, warm
    for a, b in zip(found["all"][0], found["trained"][0], strict=True):
        assert torch.equal(a, b)
    assert found["all"][1] == found["trained"][1]
    (_, _, warm), (_, _, expected) = found.values()
    assert size(warm.adjoint) == size(expected.adjoint) == size(trained(net)) < size(list(net.parameters())) / 2
    assert size(warm.state_dict()["state"]) == size(expected.state_dict()["state"])
    assert stored(warm.state_dict()) <= 1.1 * stored(expected.state_dict())


def test_solvers_receive_no_entries_for_them(loop):
    net, decay, losses = loop
    sizes = []

    class Counting(bl.LinearSolver):
        def solve(self, state, A, b, x0):
            sizes.extend([A.space.size, size(b), size(A(b)), size(x0)])
            return bl.CG(damping=5.0).solve(None, A.damped(5.0), b, None)

    adjoint0 = [torch.zeros_like(p) for p in net.parameters()]
    bilevel_torch.hypergradient(*losses(), net.parameters(), decay, solver=Counting(), adjoint0=adjoint0)
    assert sizes == [size(trained(net))] * 4


def test_their_adjoint_is_a_zero_without_memory_and_a_start_of_the_next_solve(loop):
    net, decay, losses = loop
    solver = bl.CG(damping=5.0, rtol=1e-10)
    named = dict(net.named_parameters())
    hg = bilevel_torch.hypergradient(*losses(), named, decay, solver=solver)
    assert list(hg.adjoint) == list(named) == list(hg.params)
    for name, p in named.items():
        v = hg.adjoint[name]
        assert (v.shape, v.dtype, v.device) == (p.shape, p.dtype, p.device)
        assert v.any() == p.requires_grad
        assert p.requires_grad or v.untyped_storage().nbytes() == p.element_size()
    again = bilevel_torch.hypergradient(*losses(), named, decay, solver=solver, adjoint0=hg.adjoint)
    assert again.info.steps == 0 < hg.info.steps
    assert torch.equal(again.grad, bilevel_torch.hypergradient(*losses(), trained(net), decay, solver=solver).grad)


def test_a_checkpoint_continues_with_the_same_bits(loop):
    net, decay, losses = loop
    warm, resumed = bl.WarmStart({"name": "cg", "damping": 5.0}), bl.WarmStart({"name": "cg", "damping": 5.0})
    call = lambda solver: bilevel_torch.hypergradient(*losses(), net.named_parameters(), decay, solver=solver)  # noqa: E731
    call(warm)
    file = io.BytesIO()
    torch.save(warm.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(call(resumed).grad, call(copy.deepcopy(warm)).grad)


def test_a_frozen_copy_of_a_trained_weight_is_named(loop):
    net, decay, losses = loop
    params = {**dict(net.named_parameters()), "2.weight": net[2].weight.detach()}
    with pytest.raises(ValueError, match=r"_loss was computed with another tensor than params\['2\.weight'\]"):
        bilevel_torch.hypergradient(*losses(), params, decay)
