"""Hypergradients from two losses change nothing that belongs to the user, and keep no memory."""

import gc
import resource
import threading

import pytest

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
nn, F = torch.nn, torch.nn.functional


class TestNothingChanges:
    @pytest.fixture
    def loop(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))
        log_decay = torch.tensor(-3.0, requires_grad=True)
        x, y = torch.randn(16, 4), torch.randint(2, (16,))

        def losses():
            penalty = log_decay.exp() * sum((p**2).sum() for p in net.parameters())
            return F.cross_entropy(net(x), y) + penalty, F.cross_entropy(net(x), y)

        return net, log_decay, losses

    @pytest.mark.parametrize("solver", ["cg", "minres", "neumann", "identity", "nystrom", "gmres", "exact"])
    @pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")  # what is compared is what it leaves behind
    def test_of_the_users(self, loop, solver):
        net, log_decay, losses = loop
        net[1].eval()
        losses()[0].backward()
        log_decay.grad = None
        calls = []
        net[0].weight.register_hook(lambda g: calls.append(1) or g * 10)
        net[0].bias.register_post_accumulate_grad_hook(lambda p: calls.append(2))
        inner, outer = losses()

        def state():
            held = [*net.state_dict().values(), *(p.grad for p in net.parameters()), torch.get_rng_state()]
            return [t.clone() for t in held], [m.training for m in net.modules()], list(net[0].weight._backward_hooks)

        before = state()
        bilevel_torch.backward(inner, outer, net.parameters(), log_decay, solver=solver)
        after = state()
        assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        assert before[1:] == after[1:]
        assert not calls
        assert torch.isfinite(log_decay.grad)
        inner.backward()
        assert sorted(calls) == [1, 2]  # for their own gradients they are there again

    def test_buffers_do_not_move_where_a_checkpoint_runs_a_module_again(self, loop):
        net, log_decay, _ = loop
        x, y, calls = torch.randn(16, 4), torch.randint(2, (16,)), []

        def call(x):
            calls.append(1)
            return net(x)

        def losses():
            out = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
            penalty = log_decay.exp() * sum((p**2).sum() for p in net.parameters())
            return F.cross_entropy(out, y) + penalty, F.cross_entropy(net(x), y)

        both = losses()
        before = [*(b.clone() for b in net.buffers()), torch.get_rng_state()]
        held = [id(b) for b in net.buffers()]
        bilevel_torch.backward(*both, net.parameters(), log_decay, solver=bl.CG(damping=10.0))
        assert len(calls) > 3  # the checkpoint does run it again, for each product
        assert all(torch.equal(a, b) for a, b in zip(before, [*net.buffers(), torch.get_rng_state()], strict=True))
        assert [id(b) for b in net.buffers()] == held
        both[0].backward()
        assert net[1].num_batches_tracked == before[2] + 1  # PyTorch's own affair

    def test_buffers_of_what_another_thread_trains_meanwhile_do_move(self, loop):
        net, log_decay, losses = loop
        other, x = nn.BatchNorm1d(4), torch.randn(16, 4)

        def train(_):
            thread = threading.Thread(target=other, args=(x,))
            thread.start()
            thread.join()

        inner, outer = losses()
        inner.register_hook(train)  # in the midst of a gradient
        bilevel_torch.backward(inner, outer, net.parameters(), log_decay, solver=bl.CG(damping=10.0))
        assert other.num_batches_tracked > 0

    def test_what_is_retained_of_a_hyperparameter_is_the_hypergradient_alone(self, loop):
        """Products would be added to it as well, and the last one takes the hypergradient away again."""
        net, raw, _ = loop
        decay = raw.exp()
        decay.retain_grad()
        x, y = torch.randn(16, 4), torch.randint(2, (16,))
        inner = F.cross_entropy(net(x), y) + decay * sum((p**2).sum() for p in net.parameters())
        outer, solver = F.cross_entropy(net(x), y), bl.CG(damping=10.0)
        bilevel_torch.hypergradient(inner, outer, net.parameters(), decay, solver=solver)
        assert decay.grad is None
        for repeat in (1, 2):
            hg = bilevel_torch.backward(inner, outer, net.parameters(), decay, solver=solver)
            torch.testing.assert_close(decay.grad, repeat * hg.grad)
            torch.testing.assert_close(raw.grad, repeat * hg.grad * decay)

    def test_nothing_is_left_of_a_call_that_raises(self, loop):
        net, log_decay, losses = loop
        inner, outer = losses()
        log_decay.grad = torch.tensor(7.0)
        net[0].weight.register_hook(lambda g: g)
        with pytest.raises(bl.SolverError):
            bilevel_torch.backward(inner * float("nan"), outer, net.parameters(), log_decay)
        assert log_decay.grad == 7.0
        assert net[0].weight._backward_hooks

    @pytest.mark.slow
    def test_over_two_thousand_calls_no_memory_is_kept(self, loop):
        net, log_decay, losses = loop
        solver = bl.WarmStart({"name": "neumann", "terms": 2, "damping": 10.0}, prepare_every=10)

        def run(calls):
            for _ in range(calls):
                bilevel_torch.backward(*losses(), net.parameters(), log_decay, solver=solver)
            gc.collect()
            tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
            return tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        run(100)
        tensors, peak = run(200)
        after, later = run(2_000)
        assert after == tensors
        assert later - peak <= 2_000  # KiB: less than 1 KiB a call
