"""`bl.diagnose` on modules: it catches what autograd gets wrong in silence, blames no good net, touches nothing."""

import copy
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest

import bilevel as bl
from bilevel.diagnosis.agreement import DERIVATIVES

torch = pytest.importorskip("torch")

from diagnose_nets import GOOD, MUTANTS, RANDOM, REFUSED, Function, keeper, mlp  # noqa: E402
from reports import blamed, names, words  # noqa: E402
from torch_losses import Twice  # noqa: E402

nn, F = torch.nn, torch.nn.functional

STYLES = ["own", "functional", "copies"]  # net(x), functional_call with the module's own weights, with copies


def data(seed=0, dtype=torch.float32):
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, x[:, :3].argmax(1)


def case(net, style="own"):
    """Weight decay per weight: problem, params, hparams and data."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    params = {name: p.detach().clone() for name, p in named.items()} if style == "copies" else named

    def call(params, x):
        return net(x) if style == "own" else torch.func.functional_call(net, params, (x,))

    def inner(params, hparams, x, y):
        return F.cross_entropy(call(params, x), y) + sum((hparams[k].exp() * params[k] ** 2).sum() for k in params)

    def outer(params, hparams, x, y):
        return F.cross_entropy(call(params, x), y)

    hparams = {name: torch.full_like(p, -3.0, requires_grad=False) for name, p in params.items()}
    return bl.Problem(inner, outer), params, hparams, {"inner_args": data(0), "outer_args": data(1)}


def build(make):
    torch.manual_seed(0)
    return make()


@contextmanager
def untouched(net):
    """Assert that neither the module, its tensors nor the random state change."""
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    before = [(name, t, t.data_ptr(), t._version, t.detach().clone(), t.requires_grad) for name, t in tensors]
    accumulators = [p.expand_as(p).grad_fn.next_functions[0][0] for p in net.parameters() if p.requires_grad]
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    yield
    after = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    for (name, old, pointer, version, values, requires_grad), (new_name, new) in zip(before, after, strict=True):
        assert new_name == name
        assert new is old
        assert (new.data_ptr(), new._version, new.requires_grad) == (pointer, version, requires_grad), name
        assert torch.equal(new, values)
    # What DDP's hooks hang on.
    again = [p.expand_as(p).grad_fn.next_functions[0][0] for p in net.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(accumulators, again, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.nn.modules.module._global_forward_pre_hooks


# A checkpoint under functional_call recomputes with the module's own weights: with copies of them it is a mutant.
@pytest.mark.parametrize(("name", "style"), sorted({*product(GOOD, STYLES)} - {("checkpoint", "copies")}))
def test_a_good_net_is_not_blamed(name, style):
    net = build(GOOD[name])
    problem, params, hparams, data = case(net, style)
    with untouched(net):
        report = bl.diagnose(problem, params, hparams, solver=bl.CG(damping=1.0), **data)
    assert set(names(report)) <= {"not solved", "solve failed"}
    assert not report.unchecked
    assert report.derivatives.eps < 1e-15  # in float64, though all is float32
    assert max(a.error for a in report.derivatives.of) < 1e-6


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_second_derivative_is_caught(name, style):
    make, derivative = MUTANTS[name]
    net = build(make)
    problem, params, hparams, data = case(net, style)
    with untouched(net):
        report = bl.diagnose(problem, params, hparams, solver=bl.CG(damping=1.0), **data)
    assert derivative in blamed(report)
    if derivative == "inner hvp" and "spectral" not in name:
        assert blamed(report) == {derivative}
    text = words(report)
    assert f"{derivative} contradicts differences of" in text
    assert {"spectral norm, train": "spectral_norm"}.get(name, "detach()") in text
    assert not report.ok
    assert not report.suggestions


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", REFUSED)
def test_a_second_derivative_that_is_known_to_be_wrong_is_refused(name, style):
    make, error = REFUSED[name]
    net = build(make)
    problem, params, hparams, data = case(net, style)
    with untouched(net), pytest.raises(RuntimeError, match=error):
        bl.diagnose(problem, params, hparams, solver=bl.CG(damping=1.0), **data)


def test_checkpoint_with_other_weights_than_the_modules_own_is_caught():
    problem, params, hparams, data = case(build(GOOD["checkpoint"]), "copies")
    report = bl.diagnose(problem, params, hparams, solver=bl.CG(damping=1.0), **data)
    assert "inner hvp" in blamed(report)
    assert "use_reentrant" in words(report)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", RANDOM)
def test_what_changes_from_one_evaluation_to_the_next_is_caught(name, style):
    net = build(RANDOM[name])
    problem, params, hparams, data = case(net, style)
    with untouched(net):
        report = bl.diagnose(problem, params, hparams, solver=bl.CG(damping=1.0), **data)
    assert report.findings[0].name == "not repeatable"
    assert report.repetition.new_product > 1e-3
    assert report.repetition.product == 0  # one linearization, one mask
    assert not blamed(report)
    assert "there is no other error" in report.findings[0].way_out


def test_a_generator_of_ones_own_is_caught():
    generator = torch.Generator().manual_seed(0)
    net = build(lambda: mlp(Function(lambda x: x * torch.rand(x.shape, generator=generator)), nn.Tanh()))
    problem, params, hparams, data = case(net)
    report = bl.diagnose(problem, params, hparams, solver=bl.CG(damping=1.0), **data)
    assert report.findings[0].name == "not repeatable"
    assert "inner hvp" in report.unchecked
    assert "run bl.diagnose again" in words(report)
    assert "there is no other error" not in words(report)


def test_hparams_that_are_detached_in_part_are_caught():
    problem, params, hparams, data = case(build(GOOD["tanh"]))

    def inner(params, hparams, x, y):
        half = {name: h / 2 + h.detach() / 2 for name, h in hparams.items()}
        return problem.inner(params, half, x, y)

    report = bl.diagnose(bl.Problem(inner, problem.outer), params, hparams, **data)
    assert blamed(report) == {"inner cross_vjp"}
    assert "from hparams to ∂L/∂w is cut" in words(report)


def closure(net, x, only_float32):
    """A problem whose data no argument brings and no module sees."""

    def inner(params, hparams):
        if only_float32 and hparams.dtype != torch.float32:
            raise RuntimeError("the kernel expects the dtype float32")
        out = F.linear(net[1](F.linear(x, *params[:2])), *params[2:])
        return F.mse_loss(out, x[:, :3]) + hparams.exp() * sum((p**2).sum() for p in params)

    return bl.Problem(inner, inner), list(net.parameters()), torch.tensor(-3.0)


def test_float32_data_in_a_closure_do_not_keep_the_differences_from_float64():
    report = bl.diagnose(*closure(build(GOOD["tanh"]), data()[0], False), solver=bl.CG(damping=1.0))
    assert report.derivatives.eps < 1e-15
    assert not blamed(report)
    assert not report.unchecked


def test_float32_that_a_loss_makes_or_writes_to_does_no_harm():
    x, w = torch.linspace(0, 1, 4), torch.full((4,), 0.5)

    def inner(p, h):
        out, scale = torch.zeros(4), x.clone()
        out[:2] = (p * x).sin()[:2]
        out[2:] += p[2:] ** 2
        scale.mul_(h)
        return ((out - scale) ** 2).sum() + (torch.tensor(0.5) * p**2).sum()

    dtype = torch.get_default_dtype()
    report = bl.diagnose(bl.Problem(inner, lambda p, h: (p * x).sum()), w, torch.tensor(1.0), solver=bl.CG(damping=1.0))
    assert not blamed(report)
    assert torch.get_default_dtype() == dtype
    assert torch.equal(x, torch.linspace(0, 1, 4))


class TestOnlyFloat32:
    """A loss that accepts float32 only."""

    def test_the_report_says_so(self):
        report = bl.diagnose(*closure(build(GOOD["tanh"]), data()[0], True), solver=bl.CG(damping=1.0))
        assert report.derivatives.eps == torch.finfo(torch.float32).eps
        assert "dtype" in report.derivatives.obstacle
        assert "in a dtype of epsilon 1e-07 (RuntimeError" in words(report)
        assert not blamed(report)
        assert not report.unchecked

    def test_a_mutant_is_caught_all_the_same(self):
        net = build(lambda: mlp(Function(keeper)))
        assert "inner hvp" in blamed(bl.diagnose(*closure(net, data()[0], True), solver=bl.CG(damping=1.0)))

    def test_kinks_are_not_blamed(self):
        net = build(lambda: mlp(nn.ReLU(), width=256))
        x = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
        report = bl.diagnose(*closure(net, x, True), solver=bl.CG(damping=1.0))
        assert not blamed(report)


def test_float32_inside_the_model_is_not_blamed():
    """Rounding to float32 makes steps of a smooth function: too noisy to tell is all that may be said."""
    for seed in range(5):
        torch.manual_seed(seed)
        net = mlp(nn.Tanh())

        def rounding(params, hparams, x, y, net=net):
            rounded = {name: p.float() for name, p in params.items()}
            return F.cross_entropy(torch.func.functional_call(net, rounded, (x.float(),)), y) + sum(
                (hparams[k].exp() * p**2).sum() for k, p in params.items()
            )

        problem, params, hparams, data = case(net, "copies")
        report = bl.diagnose(bl.Problem(rounding, problem.outer), params, hparams, solver=bl.CG(damping=1.0), **data)
        assert not blamed(report)


def test_kinks_at_the_very_point_are_not_blamed():
    """Zero biases and empty inputs: relu at exactly zero, where there is no Hessian."""
    net = build(lambda: mlp(nn.ReLU()))
    nn.init.zeros_(net[0].bias)
    problem, params, hparams, data = case(net)
    data["inner_args"][0][:4] = 0
    report = bl.diagnose(problem, params, hparams, solver=bl.CG(damping=1.0), **data)
    assert "inner hvp" in report.unchecked
    assert "relu of a zero" in words(report)
    assert not blamed(report)


@pytest.mark.parametrize("share", [0.0, 0.5])  # of the weights handed over
def test_a_loss_that_reads_its_arguments_from_a_closure_is_checked(share):
    w, lam = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    problem = bl.Problem(lambda p, h: (((1 - share) * w + share * p - lam) ** 2).sum(), lambda p, h: (w**3).sum())
    report = bl.diagnose(problem, w, lam)
    assert report.verified
    assert set(names(report)) == {"not solved"}


@pytest.mark.parametrize("closed", [False, True])
def test_a_wrong_mixed_derivative_is_found_in_a_closure_too(closed):
    problem, params, _, args = case(build(GOOD["tanh"]), "functional")
    h = {name: torch.full_like(p, -3.0).requires_grad_() for name, p in params.items()}

    def inner(params, hparams, x, y):
        wrong = {name: Twice.apply(lam) for name, lam in (h if closed else hparams).items()}
        return problem.inner(params, wrong, x, y)

    report = bl.diagnose(bl.Problem(inner, problem.outer), params, h, solver=bl.CG(damping=1.0), **args)
    assert blamed(report) == {"inner cross_vjp"}


class TestOtherArrays:
    """Values that are computed from the arguments before the call cannot be moved."""

    def test_of_params(self):
        w = torch.ones(3, requires_grad=True)
        half = w - 0.5
        report = bl.diagnose(
            bl.Problem(lambda p, h: ((half + p / 2 - h) ** 2).sum(), lambda p, h: (half**2).sum()), w, torch.zeros(3)
        )
        assert "other arrays" in set(names(report))
        assert report.unchecked == tuple(DERIVATIVES)
        assert "none taken: copies of params" in words(report)
        assert not report.suggestions

    def test_of_hparams(self):
        w, lam = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64, requires_grad=True)
        before = 2 * lam
        problem = bl.Problem(lambda p, h: ((p - before) ** 2).sum(), lambda p, h: (p**2).sum())
        report = bl.diagnose(problem, 2 * w, lam)
        assert set(names(report)) == {"other arrays"}
        assert report.unchecked == ("inner cross_vjp",)
        assert "inner cross_vjp changes if params and hparams are replaced by copies" in words(report)
        assert bl.hypergradient(problem, 2 * w, lam).grad == pytest.approx(np.full(3, 8.0))


class TestWrites:
    """A loss that writes to its weights."""

    def test_embedding_with_max_norm(self):
        net = build(lambda: nn.Sequential(nn.Embedding(4, 2, max_norm=0.5), nn.Flatten(), nn.Linear(6, 1)))
        tokens = torch.tensor([[0, 1, 2], [1, 2, 0]])

        def loss(params, hparams):
            return net(tokens).square().mean() + hparams.exp() * sum((p**2).sum() for p in params.values())

        params = dict(net.named_parameters())
        before = {name: p.detach().clone() for name, p in params.items()}
        report = bl.diagnose(bl.Problem(loss, loss), params, torch.tensor(0.0))
        assert report.findings[0].name == "writes"
        assert "A loss writes to params['0.weight']." in report.findings[0].what
        assert "max_norm" in report.findings[0].way_out
        assert all(torch.equal(p, before[name]) for name, p in params.items())

    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_clamp(self, requires_grad):
        w = torch.tensor([-1.0, 2.0], requires_grad=requires_grad)

        def inner(p, h):
            with torch.no_grad():
                p.clamp_(min=0)
            return ((p - h) ** 2).sum()

        report = bl.diagnose(bl.Problem(inner, lambda p, h: (p**2).sum()), w, torch.ones(2))
        assert report.written == ("params",)
        assert "may be the only cause" in words(report)
        assert torch.equal(w, torch.tensor([-1.0, 2.0]))

    def test_after_an_error_too(self):
        w = torch.tensor([-1.0, 2.0])

        def inner(p, h):
            p.detach().clamp_(min=0)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bl.diagnose(bl.Problem(inner, inner), w, torch.ones(2))
        assert torch.equal(w, torch.tensor([-1.0, 2.0]))


def test_an_error_in_the_loss_leaves_nothing_behind():
    net, calls = build(GOOD["batch norm, train"]), []
    problem, params, hparams, data = case(net)

    def inner(*args):
        calls.append(1)
        if len(calls) > fine:
            raise KeyboardInterrupt
        return problem.inner(*args)

    for fine in range(1, 9):  # noqa: B007  (inner reads it)
        calls.clear()
        with untouched(net), pytest.raises(KeyboardInterrupt):
            bl.diagnose(bl.Problem(inner, problem.outer), params, hparams, solver=bl.CG(damping=1.0), **data)


def test_stacked_modules_under_vmap_work():
    nets = [build(lambda: mlp(nn.BatchNorm1d(8), nn.Tanh()).eval()) for _ in range(2)]
    stacked, buffers = torch.func.stack_module_state(nets)
    skeleton = copy.deepcopy(nets[0]).to("meta")

    def loss(params, hparams, x, y):
        def one(params, buffers):
            return F.cross_entropy(torch.func.functional_call(skeleton, (params, buffers), (x,)), y)

        return torch.vmap(one)(params, buffers).sum() + hparams.exp() * sum((p**2).sum() for p in params.values())

    params = {name: p.detach() for name, p in stacked.items()}
    before = {name: b.clone() for name, b in buffers.items()}
    args = {"inner_args": data(0), "outer_args": data(1)}
    report = bl.diagnose(bl.Problem(loss, loss), params, torch.tensor(-3.0), solver=bl.CG(damping=1.0), **args)
    assert not blamed(report)
    assert all(torch.equal(b, before[name]) for name, b in buffers.items())
    assert all(t.is_meta for t in skeleton.state_dict().values())


@pytest.mark.parametrize("create_graph", [True, False])
def test_a_step_whose_gradients_are_constants_is_found(create_graph):
    torch.manual_seed(0)
    x, target = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)

    def loss(w, *args):
        return ((x @ w).tanh() - target).square().mean()

    def step(w, log_lr):
        w = w if w.requires_grad else w.detach().requires_grad_()
        return w - log_lr.exp() * torch.autograd.grad(loss(w), w, create_graph=create_graph)[0]

    w, log_lr = torch.ones(3, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    report = bl.diagnose(bl.FixedPoint(step, loss), w, log_lr, solver=bl.Unrolled(steps=5, step_size=1.0))
    if create_graph:
        assert report.ok, report
    else:
        assert [finding.name for finding in report.findings] == ["wrong derivative"]
        assert "torch.autograd.grad without create_graph=True in a step" in report.findings[0].way_out


def test_an_inner_loss_that_is_nan_with_finite_derivatives():
    """PyTorch's mean of cross-entropies over no examples is nan, but its gradient is zero."""
    x, ignored = torch.randn(5, 3), torch.full((5,), -100)
    problem = bl.Problem(
        lambda w, h: F.cross_entropy(x @ w, ignored) + h.exp() * (w**2).sum(), lambda w, h: ((w - 1) ** 2).sum()
    )
    (finding,) = bl.diagnose(problem, torch.zeros(3, 4), torch.zeros(())).findings
    assert finding.what == "The inner loss is nan or infinite."
    assert "a mean over no examples" in finding.way_out


def test_a_function_with_a_special_case_at_this_point():
    """The power spectrum |fft(w)|² of equal entries: autograd has no curvature where an amplitude is zero."""
    w, h = torch.full((3,), 0.5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    problem = bl.Problem(
        lambda w, h: torch.fft.fft(w).abs().pow(2).sum() + h.exp() * w.square().sum(),
        lambda w, h: (w - 2).square().sum(),
    )
    (finding,) = [each for each in bl.diagnose(problem, w, h).findings if each.name == "wrong derivative"]
    assert finding.what.startswith("inner hvp contradicts")
    assert "special case at this very point (the abs of a complex zero" in finding.way_out
