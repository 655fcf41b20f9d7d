"""Steps whose derivatives would be wrong without an error."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import bilevel as bl  # noqa: E402
import bilevel_torch  # noqa: E402

RATE = torch.tensor(0.1, dtype=torch.float64)


def gradient(w, **options):
    return torch.autograd.grad((w**4).sum() / 4, w, **options)[0]


def outer(w, rate):
    return (w**2).sum()


def run(step, w=None, outer=outer, **options):
    first = torch.ones(2, dtype=torch.float64) if w is None else w
    return bl.metagradient(bl.Training(step, outer), first, RATE, steps=3, **options)


def forgotten(w, rate, batch):
    return w - rate * gradient(w)


def backward(w, rate, batch):
    (w**4).sum().backward()
    return w - rate * w.grad


def of_torch(w, rate, batch):
    optimizer = torch.optim.SGD([w], 0.1)
    w.grad = gradient(w, create_graph=bilevel_torch.recording()).detach()
    optimizer.step()
    return w * rate


def in_place(w, rate, batch):
    return w.sub_(rate * w)


def without_grad(w, rate, batch):
    with torch.no_grad():
        return w - rate * w


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (forgotten, r"step: it computes a gradient .* without a graph.*create_graph=bilevel_torch.recording\(\)"),
        (backward, "step: it computes a gradient by the state without a graph"),
        (of_torch, r"step: it writes to the state in place .*use bilevel_torch.TrainingStep"),
        (in_place, r"step: it writes to the state in place .*use bilevel_torch.TrainingStep"),
        (without_grad, r"step: the next state has no graph .* outside of torch.no_grad\(\)"),
    ],
)
@pytest.mark.parametrize("checkpoints", ["none", "all"])
def test_steps_without_a_graph_are_refused(step, message, checkpoints):
    with pytest.raises(ValueError, match=message):
        run(step, checkpoints=checkpoints)


def test_a_gradient_that_is_constant_on_purpose_is_accepted():
    def first_order(w, rate, batch):
        return w - rate * gradient(w.detach().requires_grad_())

    def by_hand(rate):
        w, by_rate = 1.0, 0.0
        for _ in range(3):
            w, by_rate = w - rate * w**3, by_rate - w**3
        return 2 * 2 * w * by_rate

    assert run(first_order).grad.item() == pytest.approx(by_hand(0.1), rel=1e-12)


def test_a_state_that_is_cut_is_named():
    def cut(w, rate, batch):
        return w.detach() * (1 - rate)

    with pytest.warns(bl.DependenceWarning, match="the next state does not depend on the arrays of the state before"):
        run(cut)


def test_complex_tensors_are_refused_unless_they_are_constants():
    first = {"w": torch.ones(2, dtype=torch.float64), "z": torch.ones(2, dtype=torch.complex128)}

    def turn(state, rate, batch):
        return {"w": state["w"] * rate, "z": state["z"] * torch.exp(1j * rate)}

    def keep(state, rate, batch):
        return {"w": state["w"] * rate * state["z"].real, "z": state["z"]}

    def of_both(state, rate):
        return (state["w"] + state["z"].real).sum()

    with pytest.raises(TypeError, match=r"state\['z'\]: derivatives do not flow through complex.*view_as_real"):
        run(turn, first, of_both)
    assert run(keep, first, of_both).grad.item() == pytest.approx(2 * 3 * 0.1**2)


def test_generators_are_refused():
    def step(state, rate, batch):
        return state[0] * rate * torch.rand(2, generator=state[1]), state[1]

    with pytest.raises(TypeError, match=r"state\[1\]: a Generator cannot be stored.*global generators of torch"):
        run(step, (torch.ones(2), torch.Generator()))


@pytest.mark.parametrize("store", ["device", "host", "directory"])
def test_numbers_strings_and_empty_tensors_in_a_state_may_change(store, tmp_path):
    def step(state, rate, batch):
        factor = {"first": 1.0, "later": 0.5}[state["phase"]] * state["scale"]
        return {
            "w": state["w"] * (1 - rate * factor),
            "phase": "later",
            "scale": state["scale"] * 0.5,  # an integer that becomes a float
            "empty": state["empty"] * rate,
        }

    first = {"w": torch.ones(2, dtype=torch.float64), "phase": "first", "scale": 2, "empty": torch.zeros(0)}
    found = run(
        step,
        first,
        lambda state, rate: state["w"].sum(),
        checkpoints="all",
        store=tmp_path if store == "directory" else store,
    )
    factors = np.array([2.0, 0.5, 0.25])
    expected = -2 * np.prod(1 - 0.1 * factors) * (factors / (1 - 0.1 * factors)).sum()
    assert found.grad.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda w: {"v": w["w"]}, r"step\['w'\]: expected the structure of state"),
        (lambda w: {"w": w["w"], "note": print}, r"Only tensors, numbers and strings may change.*'note': 'object'"),
        (lambda w: {"w": w["w"]}, r"returned \{'w': 'Tensor'\}"),
    ],
)
def test_states_of_another_structure_are_named(after, message):
    first = {"w": torch.ones(2, dtype=torch.float64), "note": object()}
    with pytest.raises(ValueError, match=message):
        run(lambda w, rate, batch: after(w), first)


def test_a_transform_of_torch_func_is_named():
    with pytest.raises(RuntimeError, match="inside of a transform of torch"):
        torch.func.grad(lambda w: run(lambda w, rate, batch: w * rate, w).value)(torch.ones(2))


def test_a_training_step_needs_its_own_state():
    model = torch.nn.Linear(1, 1)
    step = bilevel_torch.TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), lambda m, h, b: m(b).sum())
    with pytest.raises(TypeError, match=r"state: expected the result of TrainingStep.init, got dict"):
        step(dict(model.named_parameters()), None, torch.ones(1, 1))


def test_parameters_outside_of_the_state_are_named():
    model = torch.nn.Linear(2, 1, dtype=torch.float64)
    x = torch.ones(3, 2, dtype=torch.float64)

    def step(state, rate, batch):
        loss = (model(x) ** 2).mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=bilevel_torch.recording())
        return {name: w - rate * g for (name, w), g in zip(state.items(), grads, strict=True)}

    def whole(state, rate):
        return sum((w**2).sum() for w in state.values())

    message = r"step depends on 2 trainable tensors outside of .* shapes \(1, 2\) and \(1,\).*functional_call"
    with pytest.warns(bl.DependenceWarning, match=message):
        run(step, dict(model.named_parameters()), whole)


def test_a_training_loop_in_place_of_a_step_is_found():
    model = torch.nn.Linear(2, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(state, rate, batch):
        (rate * (model(torch.ones(3, 2, dtype=torch.float64)) ** 2).mean()).backward()
        optimizer.step()
        return dict(model.named_parameters())

    with pytest.raises(ValueError, match="step: its result differs when it is computed again"):
        run(step, dict(model.named_parameters()), checkpoints="all")
