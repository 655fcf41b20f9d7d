"""Metagradients against dense forward-mode recursions, on every backend."""

import numpy as np
import pytest
from cases import mover
from frameworks import DTYPES, framework, relative_error, tolerance
from linear_run import BATCHES, HPARAMS, TARGETS, Distance, N, Step, T, expected, start, training

import bilevel as bl

PLANS = ["none", "all", "sqrt", "log", 1, 2, "auto"]


class Case:
    """The linear run in a framework."""

    def __init__(self, backend, dtype=np.float64):
        self.backend, self.move = backend, mover(backend, dtype)
        self.step = Step(self.move)
        self.hparams, self.targets = self.move(HPARAMS, TARGETS)
        self.batches = list(self.move(*BATCHES))

    def __call__(self, outer=None, at=None, batches=None, outer_args=None, **options):
        problem = bl.Training(self.step, outer or Distance(), at)
        args = (self.targets[0],) if outer_args is None else outer_args
        given = self.batches if batches is None else batches
        return bl.metagradient(problem, start(self.move), self.hparams, given, outer_args=args, **options)


@pytest.fixture(scope="module")
def case(backend):
    return Case(backend)


def compare(found, backend, steps=T, targets=TARGETS[0], dtype=np.float64):
    value, grad, by_start = expected(steps, targets)
    bound = tolerance(dtype, 10)
    assert relative_error(backend.to_numpy(found.value), value) < bound
    assert relative_error(backend.to_numpy(found.grad), grad) < bound
    assert relative_error(backend.to_numpy(found.state_grad["w"]), by_start) < bound


@pytest.mark.parametrize("checkpoints", PLANS)
@pytest.mark.parametrize("store", ["device", "host", "directory"])
def test_every_plan_and_store_gives_the_derivative_of_the_run(case, checkpoints, store, tmp_path):
    found = case(checkpoints=checkpoints, store=tmp_path if store == "directory" else store)
    compare(found, case.backend)
    assert not list(tmp_path.iterdir())
    assert (found.info.steps, found.info.bounds[-1], found.info.finite) == (T, T, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_precisions_are_right_and_kept(backend, dtype):
    found = Case(backend, dtype)(checkpoints="sqrt")
    compare(found, backend, dtype=dtype)
    assert backend.to_numpy(found.grad).dtype == dtype


@pytest.mark.parametrize("checkpoints", ["none", "sqrt"])
def test_several_values_of_outer_give_a_row_each(case, checkpoints, tmp_path):
    found = case(outer_args=(case.targets,), checkpoints=checkpoints, store=tmp_path)
    compare(found, case.backend, targets=TARGETS)


def test_the_end_of_the_run_is_returned(case):
    w, m = start(case.move).values()
    state = {"w": w, "m": m}
    for b in case.batches:
        state = case.step(state, case.hparams, b)
    found = case(checkpoints="sqrt").state
    assert relative_error(case.backend.to_numpy(found["w"]), case.backend.to_numpy(state["w"])) < 1e-14


class SumOfDistances:
    """The sum of the distances of several states."""

    def __call__(self, states, hparams, t):
        return sum(Distance()(state, hparams, t) for state in states)

    def grad(self, states, hparams, t):
        grads = [Distance().grad(state, hparams, t) for state in states]
        return [g for g, _ in grads], sum(d for _, d in grads)


@pytest.mark.parametrize("checkpoints", ["none", "sqrt", 1])
def test_outer_may_use_several_states(case, checkpoints, tmp_path):
    at = (0, 4, 11)
    found = case(SumOfDistances(), at, checkpoints=checkpoints, store=tmp_path)
    parts = [expected(steps) for steps in at]
    assert relative_error(case.backend.to_numpy(found.value), sum(p[0] for p in parts)) < 1e-12
    assert relative_error(case.backend.to_numpy(found.grad), sum(p[1] for p in parts)) < 1e-12
    assert relative_error(case.backend.to_numpy(found.state_grad["w"]), sum(p[2] for p in parts)) < 1e-12


@pytest.mark.parametrize("store", ["device", "directory"])
def test_without_hparams_there_is_the_derivative_by_the_first_state(case, store, tmp_path):
    class Fixed(Step):
        def __call__(self, state, hparams, b):
            assert hparams is None
            return super().__call__(state, case.hparams, b)

        def vjp_hparams(self, state, hparams, v, b):
            return None

    class Half(Distance):
        def __call__(self, state, hparams, t):
            return 0.5 * ((state["w"] - t) ** 2).sum(-1)

        def grad(self, state, hparams, t):
            return {"w": state["w"] - t, "m": np.zeros_like(t)}, None

    where = tmp_path if store == "directory" else store
    args = (start(case.move), None, case.batches)
    hg = bl.metagradient(
        bl.Training(Fixed(case.move), Half()), *args, outer_args=(case.targets[0],), checkpoints=2, store=where
    )
    value, _, by_start = expected(T, TARGETS[0])
    assert hg.grad is None
    assert relative_error(case.backend.to_numpy(hg.value), value - HPARAMS.sum()) < tolerance(np.float64, 10)
    assert relative_error(case.backend.to_numpy(hg.state_grad["w"]), by_start) < tolerance(np.float64, 10)


def test_batches_come_from_a_function_or_in_a_cycle(case):
    compare(case(batches=lambda t: case.batches[t], steps=T), case.backend)
    compare(case(steps=5), case.backend, steps=5)
    twice = case(batches=case.batches[:3], steps=6)
    again = case(batches=case.batches[:3] * 2)
    assert np.array_equal(case.backend.to_numpy(twice.grad), case.backend.to_numpy(again.grad))


def test_info_counts_the_steps_and_measures_the_growth(case):
    found = case(checkpoints=1, block=5).info
    assert found.bounds == (0, 5, 10, 13)
    assert (found.computed, found.stored) == (T + 10 + 5, 1)
    w = case.backend.to_numpy(case(steps=10).state["w"])
    norms = case(steps=10, checkpoints="all").info.norms
    assert norms[-1] == pytest.approx(np.linalg.norm(w - TARGETS[0]))
    assert found.growth == found.norms.max() / found.norms[-1]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("outer_args", [0, slice(None)])
def test_a_killed_call_continues_to_the_same_bits(case, outer_args, tmp_path):
    options = {"checkpoints": 2, "block": 2, "outer_args": (case.targets[outer_args],), "steps": T}
    left = [0]

    def batches(t):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return case.batches[t]

    whole = case(batches=batches, **options)
    read = -left[0]
    for kills in range(1, read, 7):
        left[0] = kills
        for _ in range(100):
            try:
                found = case(batches=batches, store=tmp_path, **options)
                break
            except Killed:
                left[0] = kills + 9
        else:
            raise AssertionError("no call came to its end")
        for name in ("grad", "state", "state_grad"):
            trees = getattr(found, name), getattr(whole, name)
            assert np.array_equal(*(case.backend.to_numpy(case.backend.space(tree).ravel(tree)) for tree in trees))
        assert np.array_equal(found.info.norms, whole.info.norms)
        assert not list(tmp_path.iterdir())


def test_a_directory_with_another_run_is_named(case, tmp_path):
    def batches(t):
        if t == 9:
            raise Killed
        return case.batches[t]

    with pytest.raises(Killed):
        case(batches=batches, steps=T, store=tmp_path, checkpoints="sqrt")
    with pytest.raises(ValueError, match=r"store: .* has the states of another run.*delete the directory"):
        case(batches=batches, steps=T - 1, store=tmp_path, checkpoints="sqrt")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": ()}, TypeError, r"batches: expected a list .* got a tuple. .* write \[batch\] and steps="),
        ({"batches": iter([1])}, TypeError, r"batches: .* got list_iterator. .* list\(loader\)"),
        ({"batches": np.ones((13, 1))}, TypeError, "batches: .* got an array"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": lambda t: t}, ValueError, r"^steps is missing\. With a function as batches, pass the number of"),
        ({"steps": 0}, ValueError, "steps: expected an integer >= 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps: expected an integer, got 2.0"),
        ({"outer_args": []}, TypeError, "outer_args: expected a tuple"),
        ({"at": (3, 20)}, ValueError, "Training.at: got 20, but the run has 13 steps"),
        ({"on_failure": "warn"}, ValueError, "on_failure: expected"),
    ],
)
def test_wrong_arguments_are_named(case, options, error, message):
    with pytest.raises(error, match=message):
        case(**options)


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        (5, TypeError, r"as in \(10, 20\), got 5"),
        ((), ValueError, "increasing"),
        ((3, 3), ValueError, "increasing"),
        ((1.5,), TypeError, "numbers of steps"),
    ],
)
def test_wrong_numbers_of_steps_are_named(at, error, message):
    with pytest.raises(error, match=f"Training.at: expected .*{message}"):
        bl.Training(min, max, at)


def test_a_training_needs_functions():
    with pytest.raises(
        TypeError, match=r"Training.step: expected a function \(state, hparams, batch\) -> state, got int"
    ):
        bl.Training(3, max)
    with pytest.raises(TypeError, match=r"training: expected bl.Training\(step, outer\), got Problem"):
        bl.metagradient(bl.Problem(min, max), np.zeros(2), np.zeros(2), steps=1)


def test_a_run_without_batches_has_a_number_of_steps(case):
    with pytest.raises(ValueError, match=r"^steps is missing\. Without batches, pass the number of steps: steps=100"):
        bl.metagradient(bl.Training(case.step, Distance()), start(case.move), case.hparams)


def test_a_function_as_a_step_in_numpy():
    problem = bl.Training(lambda state, hparams, batch: state, Distance())
    with pytest.raises(TypeError, match=r"^the step \(<lambda>\) has no method 'vjp_params'\. The numpy backend"):
        bl.metagradient(problem, np.zeros(2), np.zeros(2), steps=1)


def test_a_step_that_changes_the_state_is_named(case):
    def step(state, hparams, b):
        return {"w": state["w"][:2], "m": state["m"]}

    step.vjp_params = step.vjp_hparams = None
    problem = bl.Training(step, Distance())
    with pytest.raises(
        ValueError, match=r"step\['w'\]: expected the structure of state. .* shape \(4,\).* shape \(2,\)"
    ):
        bl.metagradient(problem, start(case.move), case.hparams, case.batches, outer_args=(case.targets[0],))


def test_a_run_that_diverges_raises(case):
    big = [1e200 * b for b in case.batches]
    with (
        pytest.raises(bl.SolverError, match="the training run diverges: F is inf after 13 steps"),
        np.errstate(all="ignore"),
    ):
        case(batches=big)
    with np.errstate(all="ignore"):
        assert not case(batches=big, on_failure="ignore").info.finite


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_hparams_without_influence_are_named(name):
    backend = framework(name)
    move = mover(backend, np.float64)
    step, hparams = Step(move), dict(zip("ab", move(HPARAMS, HPARAMS), strict=True))
    args = (start(move), hparams, list(move(*BATCHES)))

    def used(state, h, b):
        return step(state, h["a"], b)

    def unused(state, h, b):
        return step(state, 0 * state["w"][:3], b)

    def outer(state, h):
        return (state["w"] ** 2).sum()

    with pytest.warns(bl.DependenceWarning, match=r"Neither step nor outer depends on hparams\['b'\]"):
        found = bl.metagradient(bl.Training(used, outer), *args)
    assert not backend.to_numpy(found.grad["b"]).any()
    with pytest.raises(ValueError, match=r"Neither step nor outer depends on hparams\['a'\] and hparams\['b'\]"):
        bl.metagradient(bl.Training(unused, outer), *args)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_state_may_hold_numbers_and_integers(name, tmp_path):
    backend = framework(name)
    move = mover(backend, np.float64)
    step = Step(move)

    def counting(state, h, b):
        new = step({"w": state["w"], "m": state["m"]}, h, b)
        return new | {"t": state["t"] + 1, "n": state["n"] + 1, "note": state["note"], "none": None}

    first = start(move) | {"t": 0, "n": backend.from_numpy(np.arange(3)), "note": "text", "none": None}
    problem = bl.Training(counting, lambda state, h, t: ((state["w"] - t) ** 2).sum() / 2 + h.sum())
    hparams, target = move(HPARAMS, TARGETS[0])
    found = bl.metagradient(
        problem, first, hparams, list(move(*BATCHES)), outer_args=(target,), checkpoints="sqrt", store=tmp_path
    )
    compare(found, backend)
    assert (int(found.state["t"]), found.state["note"]) == (T, "text")
    assert backend.to_numpy(found.state["n"]).tolist() == [T, T + 1, T + 2]
    assert found.state_grad["t"] is found.state_grad["n"] is found.state_grad["note"] is None


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_an_outer_objective_without_the_state_is_named(name):
    backend = framework(name)
    move = mover(backend, np.float64)
    problem = bl.Training(Step(move), lambda state, h: (h**2).sum())
    with pytest.warns(bl.DependenceWarning, match=r"outer does not depend on the state.*TrainingStep.evaluate"):
        found = bl.metagradient(problem, start(move), *move(HPARAMS), list(move(*BATCHES)))
    np.testing.assert_allclose(backend.to_numpy(found.grad), 2 * HPARAMS)
    assert not found.info.norms.any()
    assert found.info.growth == 1


def test_growth_is_relative_to_the_last_norm_that_is_not_zero(case):
    found = case(SumOfDistances(), (0,), checkpoints="all").info
    assert found.norms[1:].tolist() == [0] * T
    assert found.growth == 1


def test_a_bar_shows_the_steps(case, capsys):
    pytest.importorskip("tqdm", reason="the bar is tqdm's")
    case(checkpoints="sqrt", progress=True)
    assert "metagradient: 100%" in capsys.readouterr().err


def test_a_state_needs_floating_point_arrays(case):
    with pytest.raises(ValueError, match=r"state has no floating-point arrays.*It has int. A tree consists"):
        bl.metagradient(training(case.move), {"t": 3}, case.hparams, steps=1)


def test_the_number_of_entries_is_that_of_the_state(case):
    assert case.backend.to_numpy(case().state["w"]).shape == (N,)
