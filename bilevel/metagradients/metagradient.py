"""Compute metagradients."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bilevel.backend import Backend
from bilevel.dependence import warn
from bilevel.errors import SolverError
from bilevel.messages import counted, listed
from bilevel.metagradients.journal import Journal, in_memory
from bilevel.metagradients.outer import Outer, outer_derivatives
from bilevel.metagradients.progress import Bar, progress_bar
from bilevel.metagradients.repeatable import check_repeatable
from bilevel.metagradients.results import Metagradient, MetagradientInfo
from bilevel.metagradients.run import Run
from bilevel.metagradients.schedule import Checkpoints, make_plan
from bilevel.metagradients.training import Training, as_batches, check_observed, check_training
from bilevel.options import check_choice
from bilevel.spaces.array import Args, Array, H, P
from bilevel.steps import Pulled, add, floats_of, masked, with_floats
from bilevel.validation import TREES, check_trees, find_backend

Store = Literal["device", "host"] | str | Path


def metagradient(
    training: Training,
    state: P,
    hparams: H,
    batches: object = None,
    *,
    steps: int | None = None,
    outer_args: Args = (),
    checkpoints: Checkpoints = "auto",
    block: int | None = None,
    memory: int | None = None,
    store: Store = "device",
    progress: bool = False,
    backend: Backend | str | None = None,
    on_failure: Literal["raise", "ignore"] = "raise",
) -> Metagradient[P, H]:
    """Return dF/dλ of a whole training run.

    The run is computed once forwards and once backwards. The backward pass needs the states of the run in reverse
    order. Some are stored, and the others are computed again (``checkpoints``). The result is the same to rounding.

    If F returns Q values, an array of shape (Q,), the run is computed once, and Q cotangents are pulled back together
    (``vmap`` in torch and JAX). All leaves of ``grad`` and ``state_grad`` then have a leading axis of length Q. With a
    weight for each training example as λ, ``grad`` holds the scores of each example on each query (Ilyas & Engstrom,
    "MAGIC: near-optimal data attribution for deep learning", arXiv 2504.16430).

    After the call, torch's global random generators have the states of the end of the run.

    Args:
        training: the step and the outer objective F.
        state: the first state of the run, any tree. Numbers and other leaves may be in it.
        hparams: λ, a tree of floating-point arrays. None: only ``state_grad`` is wanted, for example for MAML.
        batches: a list with one batch for each step (a shorter list is repeated), another sequence with ``len`` and
            items, a function of the step number, or None. A batch may be any tree.
        steps: the number of steps. None: the number of batches.
        outer_args: further arguments of F.
        checkpoints: the states to store, and with them the time in trainings of T steps. A step of the backward pass
            takes about two steps of a training.

            - "none": the graph of the whole run is stored, as by a loop that you differentiate yourself.
            - "all": every state is stored. One step is computed again at a time.
            - "sqrt": √T states and the graph of √T steps. One more training than "none".
            - "log": log₂T states and the graph of log₂T steps. About two more trainings than "none".
            - a number: so many states, at the best places (Griewank & Walther, 2000).
            - "auto": the least work within ``memory``.
        block: the number of steps whose graph is stored at one time. None: as ``checkpoints`` says.
        memory: bytes for states and graphs, for "auto". None: 2 GiB.
        store: where the states are stored: "device", "host", or a directory. With a directory, the work continues
            where it stopped if the process is killed and the call is repeated with the same arguments. The step, F
            and the batches must be the same. Only the first batch is compared. The files are deleted at the end, and
            other files in the directory stay.
        progress: show a bar with the time that is left. It needs the package tqdm.
        backend: a name or object. None: the backend of the arrays.
        on_failure: "raise" an error if the result is not finite, or "ignore" it.

    Returns:
        A `Metagradient`: ``grad``, ``value``, ``state``, ``state_grad`` and ``info``.

    Raises:
        TypeError, ValueError: for invalid input, for example if the step changes the structure of the state, if the
            step or its batch differs when it is computed again, or if neither the run nor F depends on λ.
        SolverError: if the result is not finite.

    >>> import numpy as np, bilevel as bl
    >>> class Descend:  # w ← w − λ w, gradient descent on w²/2 with the rate λ
    ...     def __call__(self, w, lam, batch): return w - lam * w
    ...     def vjp_params(self, w, lam, v, batch): return v - lam * v
    ...     def vjp_hparams(self, w, lam, v, batch): return -np.sum(v * w, keepdims=True)
    >>> outer = bl.problems.quadratic(np.eye(1), np.eye(1), target=np.zeros(1)).outer
    >>> training = bl.Training(Descend(), outer)
    >>> bl.metagradient(training, np.array([1.0]), np.array([0.5]), steps=3).grad  # of (1 − λ)⁶/2
    array([-0.09375])
    """
    check_choice("on_failure", on_failure, ("raise", "ignore"))
    if not isinstance(store, str | PathLike) or not str(store):
        raise TypeError(f'store: expected "device", "host" or the path of a directory, got {store!r}.')
    if store in ("cpu", "cuda", "disk", "gpu", "memory", "ram"):
        raise ValueError(
            f'store: expected "device", "host" or the path of a directory. For a directory of this name: "./{store}".'
        )
    backend = _check(training, state, hparams, outer_args, backend)
    data = as_batches(backend, batches, steps)
    check_observed(training, data.steps)
    step = backend.steps(training.step)
    first = step.start(state)
    at = (data.steps,) if training.at is None else training.at

    random = step.random_state()

    def cost() -> tuple[int, int]:
        size = sum(a.nbytes for a in floats_of(backend, first)) if in_memory(store) else 0
        return size, step.graph_bytes(first, hparams, data[0])

    plan = make_plan(checkpoints, block, data.steps, at, cost, memory)
    places = [plan.bounds.index(t) for t in (*at, data.steps)]
    step.set_random_state(random)  # the step has drawn numbers
    batch = None if in_memory(store) else data[0]
    journal = Journal(backend, store, (first, hparams, outer_args, batch, places), plan)
    if plan.segments > 1 and not journal.started:
        check_repeatable(backend, step, first, hparams, data, random)
    step.set_random_state(random)
    with progress_bar(progress) as bar:
        run = Run(backend, step, first, hparams, data, plan, journal.snapshots, places, bar.add)
        outer, pulled = _differentiate(run, journal, training, outer_args, bar)
    last = run.observations()[-1]
    journal.close()
    grad = _total(backend, hparams, outer, pulled)
    norms = [backend.to_host(journal.norms[k]) for k in range(plan.segments + 1)]
    results = (outer.value,) if hparams is None else (outer.value, grad)
    of_value, *of_grad = map(backend.to_host, backend.run(_norms, *results))
    finite = bool(np.isfinite([*norms, of_value, *of_grad]).all())
    info = MetagradientInfo(data.steps, bar.done, plan.bounds, plan.slots, np.array(norms), finite)
    if not finite and on_failure == "raise":
        raise SolverError(_not_finite(of_value, info))
    return Metagradient(grad, outer.value, last, with_floats(backend, masked(backend, first), pulled.state), info)


def _differentiate(run: Run, journal: Journal, training: Training, outer_args: Args, bar: Bar) -> tuple[Outer, Pulled]:
    """Return F, and the cotangents of the first state and of hparams through the run."""
    backend, end = run.backend, run.plan.segments
    if not journal.started:
        run.start()
    left = journal.segment
    todo = run.todo(end if left is None else left)
    bar.expect(run.work(todo))
    actions = iter(todo)
    pull = run.forwards(actions) if left is None else None
    states = run.observations()[:-1]
    outer = outer_derivatives(backend, training.outer, states, run.hparams, outer_args, training.at is not None)
    seeds = dict(zip(run.observed, outer.seeds, strict=False))
    zero = backend.space(outer.seeds[0]).zeros()

    def keep(k: int, before: Pulled, found: Pulled) -> Pulled:
        state = found.state if k not in seeds else [a + b for a, b in zip(found.state, seeds[k], strict=True)]
        pulled = Pulled(state, add(before.hparams, found.hparams))
        journal.keep(k, pulled, *backend.run(_norms, outer.weights_of(state)))
        return pulled

    if pull is None:
        rows = len(outer.value) if outer.many else None
        space = backend.space(run.hparams)
        like = run.hparams if rows is None else space.stack(rows)
        pulled = journal.kept(Pulled(zero, space.leaves(like)))
    else:
        seed = seeds.get(end, zero)
        [journal.norms[end]] = backend.run(_norms, outer.weights_of(seed))
        start = Pulled(seed, [])
        pulled = keep(end - 1, start, pull(seed, outer.many))
    return outer, run.backwards(actions, pulled, outer.many, keep)


def _check(training: object, state: object, hparams: object, outer_args: object, spec: Backend | str | None) -> Backend:
    """Return the backend. Raise a TypeError or ValueError for invalid input."""
    check_training(training)
    if not isinstance(outer_args, tuple):
        raise TypeError(f"outer_args: expected a tuple of arguments, as in (x, y), got {type(outer_args).__name__}.")
    backend = find_backend(spec, state, hparams, ("state", "hparams"))
    check_trees(backend, {"hparams": hparams}, {})
    if not (floats := floats_of(backend, state)):
        kinds = listed(sorted({type(leaf).__name__ for _, leaf in backend.leaves(state)})) or "no leaves"
        raise ValueError(
            f"state has no floating-point arrays, so there is nothing to differentiate. It has {kinds}. {TREES}"
        )
    for leaf in floats:
        backend.check_leaf("state", leaf)
    return backend


def _total(backend: Backend, hparams: H, outer: Outer, pulled: Pulled) -> H:
    """Return the derivative through the run plus ∂F/∂λ. Warn about leaves that neither depends on.

    Raise a ValueError if there is no such leaf.
    """
    space = backend.space(hparams)
    zeros = space.leaves(space.stack(len(outer.value)) if outer.many else space.zeros())
    direct = [None] * len(zeros) if outer.direct is None else space.leaves(outer.direct)
    used = [a is not None or b for a, b in zip(pulled.hparams, outer.used, strict=True)]
    names = ["hparams" + path for path, _ in backend.leaves(hparams)]
    way_out = (
        "Compute them with the hparams that are passed: a copy, a detached tensor, a number or a value that is closed "
        "over has no derivative."
    )
    if hparams is not None and not any(used):
        raise ValueError(f"Neither step nor outer depends on {listed(names)}. {way_out}")
    if not any(outer.weights):
        warn(
            "outer does not depend on the state, so the metagradient is only its derivative by hparams. Evaluate the "
            "model with the weights in the state, for example by TrainingStep.evaluate or torch.func.functional_call."
        )
    if not all(used):
        unused = listed(name for name, flag in zip(names, used, strict=True) if not flag)
        warn(f"Neither step nor outer depends on {unused}: the metagradient is zero there. {way_out}")
    parts = zip(add(pulled.hparams, direct), zeros, strict=True)
    supply = iter([zero if part is None else part for part, zero in parts])
    return backend.map(lambda _: next(supply), hparams)


def _norms(backend: Backend, *trees: Any) -> list[Array]:
    return [backend.space(tree).norm(tree) for tree in trees]


def _not_finite(value: float, info: MetagradientInfo) -> str:
    """Describe where numbers are not finite."""
    if not np.isfinite(value):
        return (
            f"the training run diverges: F is {value} after {counted(info.steps, 'step')}. Use a smaller learning "
            'rate, or shorten the run. on_failure="ignore" returns the nan.'
        )
    bad = np.flatnonzero(~np.isfinite(info.norms[:-1]))
    where = f"between the steps {info.bounds[bad[-1]]} and {info.bounds[bad[-1] + 1]}" if len(bad) else "by hparams"
    return (
        f"the derivative of the run is not finite {where}, but the run itself is. Most often, the step takes a square "
        "root or a norm of zeros: Adam where a gradient is zero. bilevel_torch.TrainingStep and "
        "bilevel_jax.differentiable(optimizer) make steps that are right there. "
        'on_failure="ignore" returns the nan.'
    )
