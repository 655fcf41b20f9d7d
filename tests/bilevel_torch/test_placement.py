"""Where a hypergradient goes: into ``.grad`` of hparams, or on to the tensors that they are computed from."""

import pytest

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")

HALF = bl.Problem(lambda w, h: ((w["a"] - h["a"]) ** 2).sum(), lambda w, h: (w["a"] ** 2).sum())


def result(value=3.0):
    """Return the hypergradient 2 h of F = |w|² with w* = h."""
    h = {"a": torch.full((2,), value)}
    return bl.hypergradient(HALF, {"a": torch.full((2,), value)}, h)


def test_it_adds_or_replaces():
    h = torch.zeros(2, requires_grad=True)
    for accumulate, expected in ((True, 6.0), (True, 12.0), (False, 6.0)):
        bilevel_torch.place_grad(result(), {"a": h}, accumulate=accumulate)
        assert torch.equal(h.grad, torch.full((2,), expected))


def test_it_flows_on_to_the_tensors_that_hparams_are_computed_from():
    raw, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    other.grad = torch.ones(2)
    h = 5 * raw
    for accumulate, expected in ((True, 30.0), (True, 60.0), (False, 30.0)):
        bilevel_torch.place_grad(result(), {"a": h}, accumulate=accumulate)
        assert torch.equal(raw.grad, torch.full((2,), expected))
    assert torch.equal(other.grad, torch.ones(2))


def test_the_names_of_a_module_fit_a_dict_in_any_order():
    net = torch.nn.Linear(1, 2)
    problem = bl.Problem(
        lambda w, h: sum(((w[n] - h[n]) ** 2).sum() for n in w), lambda w, h: sum((w[n] ** 2).sum() for n in w)
    )
    start = {n: p.detach().clone() for n, p in reversed([*net.named_parameters()])}
    bilevel_torch.place_grad(
        bl.hypergradient(problem, {n: p.clone() for n, p in start.items()}, start), net.named_parameters()
    )
    for p in net.parameters():
        torch.testing.assert_close(p.grad, 2 * p.detach())


def test_a_graph_that_is_freed_leaves_the_old_gradient():
    raw = torch.ones(2, requires_grad=True)
    h = raw.exp()
    h.sum().backward()
    raw.grad = torch.full((2,), 7.0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        bilevel_torch.place_grad(result(), {"a": h}, accumulate=False)
    assert torch.equal(raw.grad, torch.full((2,), 7.0))


@pytest.mark.parametrize(
    ("hg", "hparams", "error", "text"),
    [
        (
            result,
            lambda: {"a": torch.ones(2)},
            ValueError,
            r"hparams\['a'\] does not require a gradient: call requires",
        ),
        (
            result,
            lambda: {"a": torch.ones(3)},
            ValueError,
            r"hg\.grad\['a'\]: expected the structure of hparams.*\(3,\)",
        ),
        (result, lambda: [torch.ones(2)], ValueError, r"hg\.grad\[0\]: expected the structure of hparams"),
        (
            lambda: torch.ones(2),
            lambda: torch.ones(2),
            TypeError,
            "hg: expected the result of bl.hypergradient, got Tensor",
        ),
    ],
    ids=["no gradient", "shape", "structure", "no result"],
)
def test_hparams_that_do_not_fit_are_named(hg, hparams, error, text):
    with pytest.raises(error, match=text):
        bilevel_torch.place_grad(hg(), hparams())


class TestBackward:
    @pytest.fixture
    def losses(self):
        w, h = torch.ones(2, requires_grad=True), torch.full((2,), 0.5, requires_grad=True)
        return ((w - 1) ** 2 + h * w**2).sum(), (w**2).sum(), w, h

    def test_replaces_what_the_training_step_has_left(self, losses):
        inner, outer, w, h = losses
        inner.backward(retain_graph=True)
        assert h.grad.any()  # ∂L/∂λ
        hg = bilevel_torch.backward(inner, outer, w, h, accumulate=False)
        assert torch.equal(h.grad, hg.grad)
        bilevel_torch.backward(inner, outer, w, h)
        assert torch.equal(h.grad, 2 * hg.grad)

    def test_leaves_it_where_the_solve_fails(self, losses):
        inner, outer, w, h = losses
        h.grad = torch.full((2,), 7.0)
        with pytest.raises(bl.SolverError):
            bilevel_torch.backward(inner * float("nan"), outer, w, h, accumulate=False)
        assert torch.equal(h.grad, torch.full((2,), 7.0))
