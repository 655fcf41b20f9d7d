"""In a loop of Hugging Face Accelerate: the example, small, and what goes wrong there."""

from argparse import Namespace

import pytest
from frameworks import EXAMPLES, example, relative_error

import bilevel as bl

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate")
bilevel_torch = pytest.importorskip("bilevel_torch")
nn, F = torch.nn, torch.nn.functional

CONFIG = str(EXAMPLES / "solver.toml")
X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
SOLVER = bl.CG(damping=2.0, rtol=1e-6)


@pytest.fixture(autouse=True)
def new_process():
    """Accelerate keeps one state per process, whose precision and compilation cannot change."""
    reset()
    yield
    reset()


def reset():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.slow
class TestExample:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        pytest.importorskip("sklearn")
        pytest.importorskip("tqdm")
        (folder := tmp_path / "empty").mkdir()
        monkeypatch.chdir(folder)
        yield example("pytorch/accelerate_loop.py")
        assert list(folder.iterdir()) == []

    def test_tuning_pays_and_finds_the_wrong_labels(self, module, capsys):
        found = module.main(["--config", CONFIG, "--epochs", "60"])
        assert found["tuned, val loss"] < 0.7 * found["untuned, val loss"]
        assert found["tuned, test loss"] < 0.7 * found["untuned, test loss"]
        assert found["tuned, of the wrong"] < 0.5 < 1 < found["tuned, weight of the right"]
        assert f"{found['tuned, val loss']:.4f}" in capsys.readouterr().out

    def test_it_tunes_where_an_earlier_accelerator_compiled(self, module):
        """See findings/accelerate-second-accelerator-compiles.sh."""
        torch._dynamo.reset()
        accelerate.Accelerator(cpu=True, dynamo_backend="aot_eager")
        options = {"seed": 0, "precision": "no", "config": CONFIG, "resume": None, "out": None}
        found = module.train(Namespace(epochs=module.TUNE_FROM + 2, **options), tune=True)
        torch._dynamo.reset()
        assert found["weight of the right"] > found["of the wrong"]

    def test_a_run_that_resumes_is_the_run_that_went_on(self, module, tmp_path, monkeypatch):
        def train(epochs, resume=None, out=None):
            options = {"seed": 0, "precision": "no", "config": CONFIG}
            return module.train(Namespace(epochs=epochs, resume=resume, out=out, **options), tune=True)

        first = module.TUNE_FROM + 3
        train(first, out=tmp_path)
        state = tmp_path / f"epoch_{first}"
        whole = train(first + 2)
        assert train(first + 2, resume=state) == whole
        monkeypatch.setattr(bl.WarmStart, "load_state_dict", lambda solver, state: None)
        assert train(first + 2, resume=state) != whole


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def losses(net, log_decays):
    decay = sum((d.exp() * w**2).sum() for d, w in zip(log_decays, net.parameters(), strict=True))
    return F.mse_loss(net(X), X[:, :1]) + decay, F.mse_loss(net(X), X[:, 1:2])


def zeros(net):
    return [torch.zeros_like(w, requires_grad=True) for w in net.parameters()]


def prepared(**options):
    net = network()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    return accelerator, *accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1)), zeros(net)


def hypergradient(net, log_decays, solver=SOLVER):
    return bilevel_torch.hypergradient(*losses(net, log_decays), net.parameters(), log_decays, solver=solver)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def expected():
    """The hypergradient in a loop without a framework."""
    net = network()
    return flat(hypergradient(net, zeros(net)).grad)


def test_the_unwrapped_model_gives_the_hypergradient():
    accelerator, net, _, log_decays = prepared()
    found = hypergradient(accelerator.unwrap_model(net), log_decays)
    assert relative_error(flat(found.grad), expected()) <= 1e-6


def test_in_bfloat16_the_solve_is_in_float32():
    accelerator, net, _, log_decays = prepared(mixed_precision="bf16")
    bare = accelerator.unwrap_model(net)
    with accelerator.autocast():
        assert bare[0](X).dtype is torch.bfloat16
        found = hypergradient(bare, log_decays, bl.CG(damping=2.0, rtol=1e-2))
    assert {g.dtype for g in [*found.grad, *found.adjoint]} == {torch.float32}
    assert relative_error(flat(found.grad), expected()) <= 0.05


def test_a_compiled_model_keeps_the_bare_one():
    torch._dynamo.reset()
    accelerator, net, _, log_decays = prepared(dynamo_backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"(?s)differentiates twice.*keeps it as _orig_mod"):
        hypergradient(accelerator.unwrap_model(net), log_decays)
    found = hypergradient(accelerator.unwrap_model(net, keep_torch_compile=False), log_decays)
    torch._dynamo.reset()
    assert relative_error(flat(found.grad), expected()) <= 1e-6


def test_clipping_is_of_the_hypergradient():
    accelerator, net, _, log_decays = prepared()
    bilevel_torch.backward(*losses(net, log_decays), net.parameters(), log_decays, solver=SOLVER)
    norm = accelerator.clip_grad_norm_(log_decays, 1e-3)
    assert float(norm) == pytest.approx(float(expected().norm()), rel=1e-5)
    assert float(flat(d.grad for d in log_decays).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_while_gradients_accumulate_the_outer_optimizer_does_not_step_either():
    """What the docs warn of: Accelerate skips every step and zero_grad() until it syncs."""
    accelerator, net, _, log_decays = prepared(gradient_accumulation_steps=2)
    outer_optimizer = accelerator.prepare(torch.optim.SGD(log_decays, lr=1.0))
    for synced in (False, True):
        with accelerator.accumulate(net):
            accelerator.backward(losses(net, log_decays)[0])
            assert accelerator.sync_gradients is synced
            outer_optimizer.zero_grad()
            bilevel_torch.backward(*losses(net, log_decays), net.parameters(), log_decays, solver=SOLVER)
            outer_optimizer.step()
            assert bool(flat(log_decays).any()) is synced
    assert relative_error(flat(log_decays), -expected()) <= 1e-6


def test_a_grad_scaler_would_scale_the_hypergradient_down():
    accelerator, net, _, log_decays = prepared()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # as mixed_precision="fp16" does on a GPU
    bare = torch.optim.SGD(log_decays, lr=1.0)
    outer_optimizer = accelerator.prepare_optimizer(bare)
    accelerator.backward(losses(net, log_decays)[0])
    steps = []
    for optimizer in (outer_optimizer, bare):
        before = flat(log_decays).clone()
        outer_optimizer.zero_grad()
        bilevel_torch.backward(*losses(net, log_decays), net.parameters(), log_decays, solver=SOLVER)
        optimizer.step()
        steps.append(before - flat(log_decays))
    assert relative_error(steps[0] * 2**10, expected()) <= 1e-3
    assert relative_error(steps[1], expected()) <= 0.01  # at decays that have moved a little


def test_a_step_between_the_losses_and_the_hypergradient():
    accelerator, net, optimizer, log_decays = prepared()
    both = losses(net, log_decays)
    accelerator.backward(both[0], retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"(?s)optimizer\.step\(\)\. Take the step before both losses"):
        bilevel_torch.backward(*both, net.parameters(), log_decays, solver=SOLVER)


def test_what_a_state_holds_of_a_solver_is_its_memory(tmp_path):
    accelerator, net, _, log_decays = prepared()
    solver, other = (bl.WarmStart(bl.CG(damping=2.0)) for _ in range(2))
    accelerator.register_for_checkpointing(solver)
    found = hypergradient(net, log_decays, solver)
    accelerator.save_state(tmp_path)
    solver.reset()
    accelerator.load_state(tmp_path)
    assert relative_error(flat(solver.adjoint), flat(found.adjoint)) == 0
    assert hypergradient(net, log_decays, solver).info.steps == 0 < hypergradient(net, log_decays, other).info.steps
