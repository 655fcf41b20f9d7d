"""Metagradients of torch runs: random numbers, side effects, precisions, and steps that call autograd."""

import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import bilevel as bl  # noqa: E402
import bilevel_torch  # noqa: E402

T = 7


def noisy(state, rate, batch):
    w = state["w"]
    loss = (torch.nn.functional.dropout(w, 0.5) ** 2 * torch.rand(3, dtype=w.dtype)).sum()
    (g,) = torch.autograd.grad(loss, w, create_graph=bilevel_torch.recording())
    return {"w": w - rate * g, "graphs": state["graphs"] + int(g.requires_grad)}


def outer(state, rate):
    return (state["w"] ** 2).sum()


def run(step=noisy, w=None, rate=0.1, **options):
    first = {"w": torch.ones(3, dtype=torch.float64) if w is None else w, "graphs": 0}
    return bl.metagradient(
        bl.Training(step, outer), first, torch.tensor(rate, dtype=first["w"].dtype), steps=T, **options
    )


@pytest.mark.parametrize("checkpoints", ["auto", "none", "all", "sqrt", 1])
@pytest.mark.parametrize("store", ["device", "directory"])
def test_random_numbers_are_drawn_again_with_the_same_values(checkpoints, store, tmp_path):
    def by_hand(rate):
        torch.manual_seed(3)
        state = {"w": torch.ones(3, dtype=torch.float64), "graphs": 0}
        for _ in range(T):
            state = noisy({**state, "w": state["w"].detach().requires_grad_()}, rate, None)
        return outer(state, rate).item(), torch.get_rng_state()

    _, after = by_hand(0.1)
    difference = (by_hand(0.1 + 1e-5)[0] - by_hand(0.1 - 1e-5)[0]) / 2e-5
    torch.manual_seed(3)
    found = run(checkpoints=checkpoints, store=tmp_path if store == "directory" else store)
    assert found.grad.item() == pytest.approx(difference, rel=1e-7)
    assert torch.equal(torch.get_rng_state(), after)


def test_values_are_computed_without_a_graph_across_gradients():
    assert run(checkpoints="sqrt", block=2).state["graphs"] == 1  # only in the last segment, of one step


def test_a_step_that_writes_to_its_state_does_not_change_stored_states():
    def in_place(state, rate, batch):
        with torch.no_grad():
            state["count"].add_(1)
        w = state["w"] * (1 - rate * state["count"].clone())
        return {"w": w, "count": state["count"]}

    first = {"w": torch.ones(2, dtype=torch.float64), "count": torch.zeros(2, dtype=torch.int64)}
    rate = torch.tensor(0.05, dtype=torch.float64)
    grads = [
        bl.metagradient(bl.Training(in_place, outer), first, rate, steps=T, checkpoints=c, block=2).grad
        for c in ("none", "all", 1)
    ]
    assert first["count"].tolist() == [0, 0]
    factors = 1 - 0.05 * np.arange(1, T + 1)
    expected = -2 * 2 * np.prod(factors) ** 2 * (np.arange(1, T + 1) / factors).sum()
    assert [g.item() for g in grads] == pytest.approx([expected] * 3, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stored_states_keep_their_dtype_to_the_last_bit(dtype, tmp_path):
    def step(state, rate, batch):
        return {"w": state["w"] * (1 - rate), "graphs": 0}

    w = torch.linspace(0.1, 3.0, 5).to(dtype)
    kept, stored = (run(step, w, checkpoints="sqrt", store=store) for store in ("device", tmp_path))
    assert stored.state["w"].dtype == dtype
    assert torch.equal(kept.state_grad["w"], stored.state_grad["w"])


def test_a_call_inside_of_a_transform_is_named():
    with pytest.raises(RuntimeError, match=r"inside of a transform of torch.func"):
        torch.func.vmap(lambda x: run(w=x).grad)(torch.ones(2, 3))


def test_many_values_without_vmap_are_pulled_back_one_by_one():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g + 0 * g.sum().item()  # no vmap

    def step(state, rate, batch):
        return {"w": state["w"] - rate * Double.apply(state["w"]), "graphs": 0}

    first = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64), "graphs": 0}
    training = bl.Training(step, lambda state, rate: state["w"])
    for checkpoints in ("none", "sqrt"):
        found = bl.metagradient(
            training, first, torch.tensor(0.1, dtype=torch.float64), steps=T, checkpoints=checkpoints
        )
        assert found.grad.tolist() == pytest.approx([-2 * T * 0.8 ** (T - 1) * w for w in (1, 2)], rel=1e-12)


def test_graphs_are_freed():
    alive = weakref.WeakSet()

    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(y := x.exp())
            ctx.token = torch.nn.Identity()  # lives as long as the graph
            alive.add(ctx.token)
            return y

        @staticmethod
        def backward(ctx, *grads):
            return grads[0] * ctx.saved_tensors[0]

    def step(state, rate, batch):
        return {"w": state["w"] - rate * Exp.apply(state["w"]), "graphs": 0}

    run(step)
    assert not alive
