"""Schedules of checkpoints against the least number of steps, by dynamic programming."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.metagradients.schedule import actions, advanced, make_plan


@cache
def least(segments, slots):
    """Return the least number of segments to advance, from the recursion of Griewank & Walther."""
    if segments == 1:
        return 0
    if slots == 1:
        return segments * (segments - 1) // 2
    return min(k + least(segments - k, slots - 1) + least(k, slots) for k in range(1, segments))


def follow(todo, held, slots):
    """Carry out a schedule. Return the pulled segments and the number of advanced segments."""
    held, at, pulled, count = set(held), None, [], 0
    for kind, k in todo:
        if kind == "load":
            assert k in held
            at = k
        elif kind == "advance":
            assert k == at + 1
            at, count = k, count + 1
        elif kind == "save":
            assert k == at
            held.add(k)
            assert len(held) <= slots
        elif kind == "pull":
            assert k == at
            pulled.append(k)
        else:
            held.remove(k)
    assert not held
    return pulled, count


@given(st.integers(1, 60), st.integers(1, 12))
def test_a_schedule_takes_the_least_number_of_steps_within_its_slots(segments, slots):
    pulled, count = follow(actions(segments, [0], slots), [0], slots)
    assert pulled == list(range(segments))[::-1]
    assert count == least(segments, slots) == advanced(segments, slots)


@given(st.data())
def test_a_schedule_continues_from_any_stored_states(data):
    end = data.draw(st.integers(1, 40))
    held = {0} | data.draw(st.sets(st.integers(0, end - 1), max_size=6))
    slots = data.draw(st.integers(len(held), 10))
    assert follow(actions(end, held, slots), held, slots)[0] == list(range(end))[::-1]


def plan(checkpoints="auto", block=None, steps=100, observed=(), state=10, graph=100, memory=None):
    return make_plan(checkpoints, block, steps, observed, lambda: (state, graph), memory)


@pytest.mark.parametrize(
    ("checkpoints", "segments", "slots"),
    [("none", 1, 1), ("all", 100, 100), ("sqrt", 10, 10), ("log", 15, 7), (3, 15, 3)],
)
def test_a_plan_divides_the_run_as_its_name_says(checkpoints, segments, slots):
    found = plan(checkpoints)
    assert (found.segments, found.slots, found.bounds[0], found.bounds[-1]) == (segments, slots, 0, 100)


def test_observed_states_are_bounds_of_segments():
    assert plan("sqrt", observed=(0, 37, 100)).bounds == (0, 10, 20, 30, 37, 40, 50, 60, 70, 80, 90, 100)


@given(st.integers(1, 10**5), st.integers(0, 1000), st.integers(1, 1000), st.integers(1, 10**7))
def test_an_automatic_plan_stays_within_its_memory(steps, state, graph, memory):
    if memory < min(graph + 2 * state, steps * graph):
        with pytest.raises(ValueError, match=f"memory: {memory:,} bytes are too few.*at least {graph + 2 * state:,}"):
            plan(steps=steps, state=state, graph=graph, memory=memory)
        return
    found = plan(steps=steps, state=state, graph=graph, memory=memory)
    block = max(b - a for a, b in zip(found.bounds, found.bounds[1:], strict=False))
    assert block * graph + (found.slots * state if found.segments > 1 else 0) <= memory


def test_an_automatic_plan_keeps_the_whole_graph_where_it_fits():
    assert plan(steps=100, graph=100, memory=10_000).segments == 1
    assert plan(steps=101, graph=100, memory=10_000).segments > 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoints": 0}, ValueError, "checkpoints: expected a number of states >= 1, got 0"),
        ({"checkpoints": "square"}, ValueError, 'checkpoints: expected "auto".*Did you mean "sqrt"'),
        ({"checkpoints": 2.5}, TypeError, "checkpoints: expected .* or a number of states, got 2.5"),
        ({"block": 0}, ValueError, "block: expected an integer >= 1, got 0"),
        ({"memory": 1e9}, TypeError, "memory: expected an integer, got 1000000000.0"),
        ({"checkpoints": "sqrt", "memory": 10**9}, ValueError, 'memory: only checkpoints="auto" without a block'),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        plan(**options)
