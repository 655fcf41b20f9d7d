"""In the loops of PyTorch Lightning and of Fabric: the examples, small, and what goes wrong there."""

from argparse import Namespace

import pytest
from frameworks import EXAMPLES, example, relative_error

import bilevel as bl

torch = pytest.importorskip("torch")
L = pytest.importorskip("lightning")
bilevel_torch = pytest.importorskip("bilevel_torch")
nn, F = torch.nn, torch.nn.functional

# Lightning's own use of torch.utils._pytree, in CombinedLoader.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
CONFIG = str(EXAMPLES / "solver.toml")
X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
SOLVER = bl.CG(damping=2.0, rtol=1e-6)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run where a file that is left behind is seen."""
    (folder := tmp_path / "empty").mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture
def compiler():
    """What dynamo has compiled in one test is not for the next, here or in another file."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["pytorch/lightning_module.py", "pytorch/fabric_loop.py"])
class TestExamples:
    @pytest.fixture
    def module(self, path):
        pytest.importorskip("sklearn")
        pytest.importorskip("tqdm")
        return example(path)

    def test_tuning_pays(self, module, capsys):
        found = module.main(["--config", CONFIG, "--epochs", "80"])
        assert found["tuned, val loss"] < 0.9 * found["untuned, val loss"]
        assert f"{found['tuned, val loss']:.4f}" in capsys.readouterr().out

    def test_a_run_that_resumes_is_the_run_that_went_on(self, module, tmp_path, monkeypatch):
        def train(epochs, resume=None, out=None):
            options = {"seed": 0, "precision": "32-true"}
            return module.train(Namespace(config=CONFIG, epochs=epochs, resume=resume, out=out, **options), tune=True)

        first = module.TUNE_FROM + 3
        train(first, out=tmp_path)
        checkpoint = tmp_path / "tuned.ckpt"
        whole = train(first + 2)
        assert train(first + 2, resume=checkpoint) == whole
        monkeypatch.setattr(bl.WarmStart, "load_state_dict", lambda solver, state: None)
        assert train(first + 2, resume=checkpoint) != whole


class Loop(L.LightningModule):
    """A training loop with a decay; the tests say what it does in a step."""

    def __init__(self, step, validate=None, compiled=False):
        super().__init__()
        self.automatic_optimization = False
        net = network()
        self.net = torch.compile(net, backend="aot_eager") if compiled else net
        self.log_decay = nn.Parameter(torch.zeros(()))
        self.step, self.validate = step, validate

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD([self.log_decay], lr=0.1)]

    def training_step(self, batch, batch_idx):
        self.step(self, *self.optimizers())

    def validation_step(self, batch, batch_idx):
        self.validate(self)

    def losses(self, net=None):
        return losses(self.net if net is None else net, self.log_decay)

    def backward_(self, both):
        return bilevel_torch.backward(*both, self.net.parameters(), self.log_decay, solver=SOLVER)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def losses(net, log_decay):
    decay = log_decay.exp() * sum((w**2).sum() for w in net.parameters())
    return F.mse_loss(net(X), X[:, :1]) + decay, F.mse_loss(net(X), X[:, 1:2])


def expected():
    """The hypergradient in a loop without a framework."""
    net, log_decay = network(), torch.zeros((), requires_grad=True)
    return bilevel_torch.hypergradient(*losses(net, log_decay), net.parameters(), log_decay, solver=SOLVER).grad


def trainer(**options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return L.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, **quiet, **options)


def fit(step, compiled=False):
    """Train for one step."""
    loop = Loop(step, compiled=compiled)
    trainer(limit_val_batches=0).fit(loop, [0], [0])
    return loop


class TestLightning:
    def test_a_training_step_takes_the_hypergradient(self):
        found = fit(lambda loop, inner, outer: loop.backward_(loop.losses())).log_decay.grad
        assert relative_error(found, expected()) <= 1e-6

    def test_a_manual_backward_leaves_a_gradient_that_the_docs_say_to_clear(self):
        def step(loop, inner, outer):
            loop.manual_backward(loop.losses()[0])
            assert loop.log_decay.grad != 0
            outer.zero_grad()
            loop.backward_(loop.losses())

        assert relative_error(fit(step).log_decay.grad, expected()) <= 1e-6

    @pytest.mark.parametrize(
        ("toggled", "error"),
        [
            (0, r"hparams does not require a gradient.*in Lightning, untoggle_optimizer\(\)"),
            (1, r"params\[0\].*all frozen.*in Lightning, untoggle_optimizer\(\)"),
        ],
    )
    def test_a_toggled_optimizer_freezes_what_the_hypergradient_needs(self, toggled, error):
        def step(loop, *optimizers):
            loop.toggle_optimizer(optimizers[toggled])
            loop.backward_(loop.losses())

        with pytest.raises(ValueError, match=error):
            fit(step)

    def test_losses_of_a_toggled_optimizer_do_not_know_the_hyperparameters(self):
        def step(loop, inner, outer):
            loop.toggle_optimizer(inner)
            both = loop.losses()
            loop.untoggle_optimizer(inner)
            loop.backward_(both)

        with pytest.raises(ValueError, match=r"Neither loss depends on hparams.*while they require gradients"):
            fit(step)

    def test_untoggled_all_is_well(self):
        def step(loop, inner, outer):
            with loop.toggled_optimizer(inner):
                loop.manual_backward(loop.losses()[0])
            assert loop.log_decay.grad is None
            loop.backward_(loop.losses())

        assert relative_error(fit(step).log_decay.grad, expected()) <= 1e-6

    def test_a_step_between_the_losses_and_the_hypergradient(self):
        def step(loop, inner, outer):
            both = loop.losses()
            loop.manual_backward(both[0], retain_graph=True)
            inner.step()
            loop.backward_(both)

        with pytest.raises(RuntimeError, match=r"(?s)optimizer\.step\(\)\. Take the step before both losses"):
            fit(step)

    def test_a_validation_step_records_nothing(self):
        loop = Loop(lambda *_: None, lambda loop: loop.backward_(loop.losses()))
        with pytest.raises(ValueError, match=r"inner_loss has no graph.*no_grad"):
            trainer().fit(loop, [0], [0])
        with pytest.raises(RuntimeError, match=r"inference_mode.*would be zero"):
            trainer().validate(loop, [0])

    def test_clipping_is_of_the_hypergradient(self):
        def step(loop, inner, outer):
            loop.backward_(loop.losses())
            loop.clip_gradients(outer, gradient_clip_val=1e-3)

        clipped = fit(step).log_decay.grad
        assert abs(expected()) > 1e-3
        assert float(abs(clipped)) == pytest.approx(1e-3, rel=1e-3)

    def test_a_grad_scaler_would_scale_the_hypergradient_down(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def step(loop, inner, outer):
            loop.manual_backward(loop.losses()[0])
            inner.step()
            solver, both = bl.CG(damping=2.0, rtol=1e-2), loop.losses()
            outer.zero_grad()
            hg = bilevel_torch.backward(
                *both, loop.net.parameters(), loop.log_decay, solver=solver, loss_scale=scaler.get_scale()
            )
            steps = []
            for optimizer in (outer.optimizer, outer):
                before = loop.log_decay.item()
                optimizer.step()
                steps.append(before - loop.log_decay.item())
            assert steps[0] == pytest.approx(0.1 * float(hg.grad), rel=1e-5)
            assert steps[1] == pytest.approx(steps[0] / 2**10, rel=0.1)

        plugin = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        trainer(limit_val_batches=0, plugins=[plugin]).fit(Loop(step), [0], [0])

    def test_a_compiled_network_keeps_the_bare_one(self, compiler):
        with pytest.raises(RuntimeError, match=r"(?s)differentiates twice.*keeps it as _orig_mod"):
            fit(lambda loop, inner, outer: loop.backward_(loop.losses()), compiled=True)
        found = fit(lambda loop, inner, outer: loop.backward_(loop.losses(loop.net._orig_mod)), compiled=True)
        assert relative_error(found.log_decay.grad, expected()) <= 1e-6


class TestFabric:
    def setup_(self, precision="32-true", compiled=False):
        fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer = fabric.setup(torch.compile(net, backend="aot_eager") if compiled else net, optimizer)
        return fabric, net, torch.zeros((), requires_grad=True)

    def hypergradient(self, both, net, log_decay, solver=SOLVER):
        return bilevel_torch.hypergradient(*both, net.parameters(), log_decay, solver=solver)

    def test_in_full_precision_the_wrapped_module_does(self):
        _, net, log_decay = self.setup_()
        found = self.hypergradient(losses(net, log_decay), net, log_decay)
        assert relative_error(found.grad, expected()) <= 1e-6

    def test_in_mixed_precision_the_wrapped_module_names_the_bare_one(self):
        _, net, log_decay = self.setup_("bf16-mixed")
        with pytest.raises(RuntimeError, match=r"(?s)^Fabric requires.*keep as module.*fabric\.autocast\(\)"):
            self.hypergradient(losses(net, log_decay), net, log_decay)

    def test_in_mixed_precision_the_bare_module_does_and_the_solve_is_in_float32(self):
        fabric, net, log_decay = self.setup_("bf16-mixed")
        with fabric.autocast():
            assert net.module(X).dtype is torch.bfloat16
            found = self.hypergradient(losses(net.module, log_decay), net, log_decay, bl.CG(damping=2.0, rtol=1e-2))
        assert found.grad.dtype is torch.float32
        assert {v.dtype for v in found.adjoint} == {torch.float32}
        assert relative_error(found.grad, expected()) <= 0.05

    def test_a_compiled_module_keeps_the_bare_one(self, compiler):
        _, net, log_decay = self.setup_(compiled=True)
        with pytest.raises(RuntimeError, match=r"(?s)differentiates twice.*Fabric's wrapper as module"):
            self.hypergradient(losses(net, log_decay), net, log_decay)
        found = self.hypergradient(losses(net.module, log_decay), net, log_decay)
        assert relative_error(found.grad, expected()) <= 1e-6
