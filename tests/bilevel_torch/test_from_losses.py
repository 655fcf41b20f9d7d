"""Hypergradients from the two losses of a training loop, on the modules that people train."""

import numpy as np
import pytest
from frameworks import relative_error
from scipy import linalg

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
from torch_losses import flat  # noqa: E402

nn, F = torch.nn, torch.nn.functional

DAMPING = 5.0  # above any negative eigenvalue of these nets with random weights
SOLVER = bl.CG(damping=DAMPING, rtol=1e-12, maxiter=500)


def expected_hypergradient(losses, params, hparams, damping=DAMPING, step=1e-5):
    """By central differences of first derivatives, in float64, and a dense solve: no second derivative by autograd."""

    def grads(index, *inputs):
        loss = losses()[index]
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        return flat([torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)])

    rows = []
    for p in params:
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * step
                ends.append(grads(0, *params, *hparams))
                with torch.no_grad():
                    p.view(-1)[i] -= sign * step
            rows.append((ends[0] - ends[1]) / (2 * step))
    jacobian, n = np.stack(rows), sum(p.numel() for p in params)
    H, cross = jacobian[:, :n], jacobian[:, n:]
    v = linalg.solve((H + H.T) / 2 + damping * np.eye(n), grads(1, *params))
    return grads(1, *hparams) - cross.T @ v


class Tied(nn.Module):
    """Reads words by the weights that it writes them with."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(5, 3), nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 5)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.lstm(self.embed(x))[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attend, self.out = (
            nn.Embedding(5, 4),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        z = self.embed(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.out(self.attend(z, z, z, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant=False):
        super().__init__()
        self.body, self.out, self.use_reentrant = (
            nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            nn.Linear(4, 3),
            use_reentrant,
        )

    def forward(self, x):
        return self.out(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.use_reentrant))


class Symmetric(nn.Module):
    def forward(self, X):
        return X.triu() + X.triu(1).T


def parametrized():
    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))


def partly_frozen():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[2].requires_grad_(False)
    net.add_module("unused", nn.Linear(2, 2))
    net.forward = lambda x: net[4](net[3](net[2](net[1](net[0](x)))))
    return net


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)),
    "batch norm, dropout": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 3),
    ),
    "LSTM, tied embedding": Tied,
    "attention": Attentive,
    "GRU": Recurrent,
    "checkpoint": Checkpointed,
    "parametrization": parametrized,
    "frozen and unused parameters": partly_frozen,
}


def batch(name, generator):
    if name in ("LSTM, tied embedding", "attention"):
        return torch.randint(5, (12, 3), generator=generator)
    shape = (12, 3, 2) if name == "GRU" else (12, 4)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NETS)
def test_it_matches_differences_on(name):
    """With a weight for each example, and a decay of one value, under the net's own dropout mask."""
    torch.manual_seed(0)
    net, generator = NETS[name]().double(), torch.Generator().manual_seed(1)
    x, x_val = batch(name, generator), batch(name, generator)
    y, y_val = (torch.randint(3, (12,), generator=generator) for _ in range(2))
    weights = torch.randn(12, generator=generator, dtype=torch.float64).requires_grad_()
    decay = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)

    def losses():
        torch.manual_seed(2)  # one mask, as one forward pass has
        inner = (weights.sigmoid() * F.cross_entropy(net(x), y, reduction="none")).mean()
        penalty = sum((p**2).sum() for p in net.parameters() if p.requires_grad)
        return inner + decay.exp() * penalty, F.cross_entropy(net(x_val), y_val)

    hparams = {"decay": decay, "weights": weights}
    hg = bilevel_torch.backward(*losses(), net.named_parameters(), hparams, solver=SOLVER)
    trained = [p for p in net.parameters() if p.requires_grad]
    expected = expected_hypergradient(losses, trained, [decay, weights])
    assert relative_error(flat([decay.grad, weights.grad]), expected) <= 1e-6
    for path, p in net.named_parameters():
        assert p.requires_grad or not hg.adjoint[path].any(), path


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", ["cg", "minres", "neumann", "gmres", "exact"])
def test_on_cuda_it_is_that_of_the_cpu(solver):
    """With what a solver remembers brought from one to the other."""
    options = {"terms": 200} if solver == "neumann" else {}
    memory, found = None, {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = NETS["mlp"]().double().to(device)
        x, x_val = torch.randn(2, 12, 4, dtype=torch.float64).to(device)
        y, y_val = torch.randint(3, (2, 12)).to(device)
        decay = torch.tensor(-2.0, dtype=torch.float64, device=device, requires_grad=True)
        warm = bl.WarmStart({"name": solver, "damping": DAMPING, **options})
        if memory is not None:
            warm.load_state_dict(memory)
        for _ in range(2):
            penalty = decay.exp() * sum((p**2).sum() for p in net.parameters())
            inner, outer = F.cross_entropy(net(x), y) + penalty, F.cross_entropy(net(x_val), y_val)
            hg = bilevel_torch.backward(inner, outer, net.parameters(), decay, solver=warm)
        assert decay.grad.device.type == hg.adjoint[0].device.type == device
        memory, found[device] = warm.state_dict(), decay.grad.cpu()
    assert relative_error(found["cuda"], found["cpu"]) <= 1e-4


class TestHyperparameters:
    """Everything that can be in the graph of a loss."""

    @pytest.fixture(autouse=True)
    def setup(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.x, self.x_val = torch.randn(2, 10, 3, dtype=torch.float64)
        self.y, self.y_val = torch.randint(2, (2, 10))

    def check(self, losses, hparams):
        hg = bilevel_torch.hypergradient(*losses(), self.net.parameters(), hparams, solver=SOLVER)
        expected = expected_hypergradient(losses, list(self.net.parameters()), hparams)
        assert relative_error(flat(hg.grad), expected) <= 1e-6
        assert all(h.grad is None for h in hparams)

    def validation(self):
        return F.cross_entropy(self.net(self.x_val), self.y_val)

    def test_weights_of_two_losses_one_of_them_in_both_objectives(self):
        a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, -0.5))

        def losses():
            out = self.net(self.x)
            return a.exp() * F.cross_entropy(out, self.y) + b.exp() * (out**2).mean(), self.validation() + a**2

        self.check(losses, [a, b])

    def test_a_decay_for_each_weight(self):
        decays = [torch.full_like(p, -2.0, requires_grad=True) for p in self.net.parameters()]

        def losses():
            penalty = sum((d.exp() * p**2).sum() for d, p in zip(decays, self.net.parameters(), strict=True))
            return F.cross_entropy(self.net(self.x), self.y) + penalty, self.validation()

        self.check(losses, decays)

    def test_learned_data_and_soft_labels(self):
        data = self.x.clone().requires_grad_()
        labels = torch.zeros(10, 2, dtype=torch.float64, requires_grad=True)
        self.check(lambda: (F.cross_entropy(self.net(data), labels.softmax(1)), self.validation()), [data, labels])

    def test_a_network_that_augments_the_data(self):
        augment = nn.Linear(3, 3).double()

        def losses():
            return F.cross_entropy(self.net(self.x + augment(self.x).tanh()), self.y), self.validation()

        self.check(losses, list(augment.parameters()))

    def test_hyperparameters_computed_from_others_pass_their_gradient_on(self):
        raw = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)

        def losses(weights=None):
            w = raw.exp() if weights is None else weights
            return w[0] * F.cross_entropy(self.net(self.x), self.y) + w[1] * sum(
                (p**2).sum() for p in self.net.parameters()
            ), self.validation()

        weights = raw.exp()
        for repeat in (1, 2):  # accumulates; and the graphs are still there
            bilevel_torch.backward(*losses(weights), self.net.parameters(), weights, solver=SOLVER)
            expected = expected_hypergradient(losses, list(self.net.parameters()), [raw])
            assert relative_error(raw.grad, repeat * expected) <= 1e-6

    def test_losses_that_share_a_forward_pass(self):
        weight = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

        def losses():
            out = self.net(torch.cat([self.x, self.x_val]))
            penalty = weight.exp() * (out[:10] ** 2).mean()
            return F.cross_entropy(out[:10], self.y) + penalty, F.cross_entropy(out[10:], self.y_val) + 0.1 * penalty

        self.check(losses, [weight])

    def test_parameter_groups(self):
        decays = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-2.0, -1.0)]
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)

        def losses():
            penalty = sum(
                d.exp() * sum((p**2).sum() for p in group["params"])
                for d, group in zip(decays, optimizer.param_groups, strict=True)
            )
            return F.cross_entropy(self.net(self.x), self.y) + penalty, self.validation()

        params = [group["params"] for group in optimizer.param_groups]
        hg = bilevel_torch.hypergradient(*losses(), params, decays, solver=SOLVER)
        expected = expected_hypergradient(losses, list(self.net.parameters()), decays)
        assert relative_error(flat(hg.grad), expected) <= 1e-6
        assert [len(group) for group in hg.adjoint] == [2, 2]

    def test_an_initialisation_through_unrolled_steps(self):
        """The params of the problem are what training adds to the initial weights, so that they start at zero."""
        names = [name for name, _ in self.net.named_parameters()]

        def call(offsets, start, x):
            moved = {name: start[name] + offsets[name] for name in names}
            return torch.func.functional_call(self.net, moved, (x,))

        problem = bl.Problem(
            lambda w, h, x, y: F.cross_entropy(call(w, h, x), y), lambda w, h, x, y: F.cross_entropy(call(w, h, x), y)
        )
        start = {name: p.detach() for name, p in self.net.named_parameters()}
        hg = bl.hypergradient(
            problem,
            {name: torch.zeros_like(p) for name, p in start.items()},
            start,
            inner_args=(self.x, self.y),
            outer_args=(self.x_val, self.y_val),
            solver=bl.Unrolled(steps=4, step_size=0.3),
        )
        first = {name: p.clone().requires_grad_() for name, p in start.items()}
        w = first
        for _ in range(4):
            loss = F.cross_entropy(torch.func.functional_call(self.net, w, (self.x,)), self.y)
            grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
            w = {name: p - 0.3 * g for (name, p), g in zip(w.items(), grads, strict=True)}
        F.cross_entropy(torch.func.functional_call(self.net, w, (self.x_val,)), self.y_val).backward()
        assert relative_error(flat(hg.grad[n] for n in names), flat(first[n].grad for n in names)) <= 1e-10

    def test_learning_rates_through_unrolled_steps(self):
        """An optimizer's step is a map with hyperparameters of its own."""
        names = [name for name, _ in self.net.named_parameters()]

        def loss(w, x, y):
            return F.cross_entropy(torch.func.functional_call(self.net, w, (x,)), y)

        def step(state, h, x, y):
            """One step of momentum, with a learning rate for each tensor."""
            grads = torch.autograd.grad(loss(state["w"], x, y), [state["w"][n] for n in names], create_graph=True)
            m = {n: h["momentum"].sigmoid() * state["m"][n] + g for n, g in zip(names, grads, strict=True)}
            return {"w": {n: state["w"][n] - h["log_lr"][n].exp() * m[n] for n in names}, "m": m}

        problem = bl.FixedPoint(step, lambda state, h, x, y: loss(state["w"], x, y))
        w = {name: p.detach() for name, p in self.net.named_parameters()}
        state = {"w": w, "m": {name: torch.zeros_like(p) for name, p in w.items()}}
        rates = {name: torch.tensor(-2.0, dtype=torch.float64) for name in names}
        hparams = {"log_lr": rates, "momentum": torch.tensor(0.5, dtype=torch.float64)}
        hg = bl.hypergradient(
            problem,
            state,
            hparams,
            inner_args=(self.x, self.y),
            outer_args=(self.x_val, self.y_val),
            solver=bl.Unrolled(steps=5, step_size=1.0),
            on_failure="ignore",
        )

        def trained(h):
            s = {"w": {n: p.requires_grad_() for n, p in w.items()}, "m": state["m"]}
            for _ in range(5):
                s = step(s, h, self.x, self.y)
            return loss(s["w"], self.x_val, self.y_val)

        h = {
            "log_lr": {n: r.clone().requires_grad_() for n, r in rates.items()},
            "momentum": hparams["momentum"].clone().requires_grad_(),
        }
        trained(h).backward()
        found = [*(hg.grad["log_lr"][n] for n in names), hg.grad["momentum"]]
        assert relative_error(flat(found), flat([*(h["log_lr"][n].grad for n in names), h["momentum"].grad])) <= 1e-10
