"""The examples of recipes: their derivatives, and small versions of their results."""

import pytest
from frameworks import example, relative_error

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")


class TestMetaWeightNet:
    mwn = example("pytorch/meta_weight_net.py")

    def trained(self, detach=False):
        """Return a loop after some steps, with weights that depend on the losses, and batches."""
        noisy, held = ((x.double(), y) for x, y in self.mwn.read(None, 0)[::2])
        torch.manual_seed(0)
        loop = self.mwn.Loop("equal weights", 64, detach)
        torch.nn.init.normal_(loop.weights.scores[2].weight, std=0.3)
        loop.net.double()
        loop.weights.double()
        loop.train(noisy, held, 5, 0)
        return loop, (noisy[0][:50], noisy[1][:50]), (held[0][:50], held[1][:50])

    def gradient(self, loop):
        return torch.cat([w.grad.ravel() for w in loop.weights.parameters()])

    @pytest.mark.parametrize("detach", [False, True])
    def test_the_gradient_of_one_step_equals_a_step_by_hand(self, detach):
        loop, batch, clean = self.trained(detach)
        loop.one_step(batch, clean)
        names, weights = zip(*loop.net.named_parameters(), strict=True)
        losses = cross_entropy(loop.net(batch[0]), batch[1], reduction="none")
        scores = loop.weights.scores((losses.detach() if detach else losses)[:, None])[:, 0]
        inner = (len(losses) * scores.softmax(0) * losses).mean()
        grads = torch.autograd.grad(inner, weights, create_graph=True)
        moments = [loop.optimizer.state[w]["momentum_buffer"] for w in weights]
        moved = [w - self.mwn.RATE * (0.9 * m + g) for w, m, g in zip(weights, moments, grads, strict=True)]
        outer = cross_entropy(functional_call(loop.net, dict(zip(names, moved, strict=True)), (clean[0],)), clean[1])
        expected = torch.autograd.grad(outer, list(loop.weights.parameters()))
        assert relative_error(self.gradient(loop), torch.cat([g.ravel() for g in expected])) < 1e-10

    def test_differences_see_through_a_detach(self):
        cosines = {}
        for detach in (False, True):
            loop, batch, clean = self.trained(detach)
            loop.by_cg(batch, clean)
            loop.solver = "identity"
            loop.by_cg(batch, clean)
            exact = self.gradient(loop)
            loop.by_gradients(batch, clean)
            cosines[detach] = float(torch.cosine_similarity(exact, self.gradient(loop), 0))
        assert cosines[False] > 1 - 1e-6
        assert cosines[True] < 0.98

    @pytest.mark.slow
    def test_wrong_labels_lose_weight(self, capsys):
        found = self.mwn.main(["--fast"])
        assert found["equal weights"][1:3] == [1, 1]
        for method in ("one step", "first order", "cg"):
            accuracy, right, wrong, _ = found[method]
            assert right > wrong
            assert accuracy > found["equal weights"][0]
        assert "CPU seconds" in capsys.readouterr().out


class TestDARTS:
    darts = example("pytorch/darts.py")

    def test_a_mixture_of_one_operation_is_that_operation(self):
        torch.manual_seed(0)
        net, choice = self.darts.Network(), ["blur", "convolution", "maximum"]
        alone = self.darts.Network(choice)
        for edge, mixture, name in zip(alone.edges, net.edges, choice, strict=True):
            edge.load_state_dict(mixture.operations[name].state_dict())
        alone.stem, alone.head = net.stem, net.head
        scores = torch.tensor([[100.0 * (name == chosen) for name in self.darts.NAMES] for chosen in choice])
        x = torch.rand(3, 1, 8, 8)
        assert torch.allclose(net(x, scores), alone(x), atol=1e-6)

    def test_random_search_keeps_the_best_on_the_second_half(self, monkeypatch):
        first, second, _ = self.darts.read(None, 0)
        losses, choices = iter([3.0, 1.0, 2.0]), iter("abc")
        clock = iter([0.0, 1.0, 2.0, 3.0])  # read once before, and after each network
        monkeypatch.setattr(self.darts, "random_choice", lambda generator: [next(choices)])
        monkeypatch.setattr(self.darts, "train", lambda *_: None)
        monkeypatch.setattr(self.darts, "loss", lambda *_: next(losses))
        monkeypatch.setattr(self.darts.time, "process_time", lambda: next(clock))
        assert self.darts.random_search(first, second, 1, 0, seconds=3.0) == ["b"]

    @pytest.mark.slow
    def test_networks_are_found(self, capsys):
        found = self.darts.main(["--fast"])
        assert set(found) == {"random", "direct", "first order", "random search"}
        assert min(accuracy for accuracy, _ in found.values()) > 0.6  # chance is 0.1
        assert "seed 0, first order:" in capsys.readouterr().out
