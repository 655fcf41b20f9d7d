"""Stored states in a directory: other files, unusable paths, and what tells runs apart."""

from pathlib import Path

import numpy as np
import pytest

import bilevel as bl
from bilevel.metagradients.journal import Journal
from bilevel.metagradients.schedule import Plan
from bilevel.metagradients.snapshots import Snapshots


class Scale:
    """w ← λ w."""

    def __call__(self, w, h, b):
        return h * w * b

    def vjp_params(self, w, h, v, b):
        return h * v * b

    def vjp_hparams(self, w, h, v, b):
        return w * v * b


class Total:
    """F = Σ w."""

    def __call__(self, w, h, *args):
        return w.sum()

    def grad(self, w, h, *args):
        return np.ones_like(w), None


STEPS = 6
W, H, ONES = np.ones(2), np.full(2, 0.5), [np.ones(2)] * STEPS


def run(store, batches=ONES, outer_args=(), **options):
    training = bl.Training(Scale(), Total())
    found = bl.metagradient(training, W, H, batches, outer_args=outer_args, store=store, checkpoints="all", **options)
    np.testing.assert_allclose(found.grad, STEPS * H ** (STEPS - 1))


def stop(store, batches=ONES, outer_args=()):
    """Stop a call in the middle."""

    def until(t):
        if t == 4:
            raise KeyboardInterrupt
        return batches[t]

    with pytest.raises(KeyboardInterrupt):
        run(store, until, outer_args, steps=STEPS)


def test_other_files_stay(tmp_path):
    kept = {"notes.txt": b"text", "state-best.npz": b"weights", "run.npz": b"run", "old.unfinished": b""}
    for name, text in kept.items():
        (tmp_path / name).write_bytes(text)
    run(tmp_path)
    stop(tmp_path)
    run(str(tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept


def test_files_of_a_kill_while_they_were_written_are_deleted(tmp_path):
    stop(tmp_path)
    (tmp_path / "state-9.bilevel.unfinished").write_bytes(b"half")
    run(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("segment", range(STEPS - 1))
def test_a_kill_before_a_used_state_is_deleted_changes_no_result(segment, tmp_path, monkeypatch):
    def drop(self, name):
        if name == f"state-{segment}":
            raise KeyboardInterrupt
        del self.store[name]

    with monkeypatch.context() as patched:
        patched.setattr(Snapshots, "drop", drop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_kill_while_files_are_deleted_leaves_no_run(tmp_path):
    stop(tmp_path)
    (tmp_path / "run.bilevel.npz").unlink()  # `Journal.close` deletes it first
    (tmp_path / "state-1.bilevel.npz").write_bytes(b"would be an error")
    run(tmp_path)


def test_the_first_batch_and_the_arguments_of_outer_tell_runs_apart(tmp_path):
    stop(tmp_path, outer_args=(np.ones(1),))
    with pytest.raises(ValueError, match=r"another run: .* outer_args, the first batch, .* Seed the order"):
        run(tmp_path, outer_args=(np.zeros(1),))
    with pytest.raises(ValueError, match="another run"):
        run(tmp_path, [2 * np.ones(2), *ONES[1:]], outer_args=(np.ones(1),))
    run(tmp_path, outer_args=(np.ones(1),))


def test_objects_in_a_run_are_known_by_their_type(tmp_path):
    # The address of an object differs in each process.
    for _ in range(2):
        Journal(bl.get_backend("numpy"), tmp_path, [object(), W], Plan((0, 1), 1))


def test_unusable_paths_are_named(tmp_path):
    (file := tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match=r"store: '.*file' is no directory .* in \(File exists\)"):
        run(file)
    with pytest.raises(ValueError, match=r"store: '/proc/none' is no directory .* \"host\" or \"device\""):
        run("/proc/none")
    for store in ("", 3):
        with pytest.raises(
            TypeError, match=f'store: expected "device", "host" or the path of a directory, got {store!r}'
        ):
            run(store)
    with pytest.raises(ValueError, match=r'store: expected "device", "host" or .* of this name: "\./gpu"'):
        run("gpu")
    assert file.read_text() == "text"


def test_a_relative_path_may_have_no_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("new/run")
    assert not list(Path("new/run").iterdir())
