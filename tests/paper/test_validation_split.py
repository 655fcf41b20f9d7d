"""How much data to hold out: the paper's figure 9 in small, with its report."""

import numpy as np
import pytest
from paper_systems import check_stored, report_of

import bilevel as bl
from bilevel.testing import check_hypergradient

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.fixture(scope="module")
def command(command):
    return [*command, "--only", "few", "many"]


def images(count, seeds=(0, 1)):
    """Few images of few pixels with noise in their labels, for several seeds."""
    keys = [jax.random.split(jax.random.key(seed)) for seed in seeds]
    x = jax.numpy.stack([jax.random.normal(key[0], (count, 6)) for key in keys])
    noise = jax.numpy.stack([jax.random.normal(key[1], (count, 3)) for key in keys])
    return x, (x[..., :3] + 2 * noise).argmax(-1)


@pytest.mark.parametrize("shape", [(), (6, 10)], ids=["one decay", "one per weight"])
def test_the_hypergradient_agrees_with_the_dense_hessian(system, shape):
    train_set, validation_set = ((x[0], y[0]) for x, y in (images(9), images(7, (2,))))
    w = 0.3 * jax.random.normal(jax.random.key(3), (6, 10))
    log_decay = jax.numpy.full(shape, -2.0)
    check_hypergradient(
        system.problem, w, log_decay, inner_args=train_set, outer_args=validation_set, solver=bl.CG(rtol=1e-10)
    )


@pytest.mark.parametrize("solver", [bl.Identity(), bl.CG(damping=0.1, rtol=1e-3)], ids=["identity", "cg"])
def test_tuned_decays_beat_those_of_the_start_for_every_seed(system, solver):
    train_set, validation_set = images(30), images(200, (2, 3))
    log_decay = jax.numpy.full((2, 6, 10), system.START)
    w, tuned, unsolved = system.tune(log_decay, train_set, validation_set, 5, 100, solver)
    untuned = system.fit(log_decay, train_set, 500)
    loss = jax.vmap(lambda w, x, y: system.outer(w, None, x, y))
    assert (loss(w, *validation_set) < loss(untuned, *validation_set)).all()
    assert (unsolved == 0).all()
    assert (tuned <= -np.log(system.LEARNING_RATE) + 1e-6).all()  # or training would be unstable


def test_each_share_of_held_out_data_is_tried(system, histories):
    assert set(histories) == {"few-80-0", "many-80-0"}
    for history in histories.values():
        rows = history["rows"]
        assert [row["share"] for row in rows] == [0.0, 0.25, 0.75]
        assert rows[0]["log_decay"] == system.START  # nothing held out, nothing tuned
        assert all(row["retrained"] > 0.6 for row in rows)
    assert histories["many-80-0"]["result"]["hyperparameters"] == 650


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


def test_the_report_has_a_table_and_a_picture(system, histories, tmp_path):
    assert "| --- |" in report_of(system, histories, tmp_path)
