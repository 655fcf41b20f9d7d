"""The loop of distillation.py in JAX, with the same losses: the steps between two rows are one compiled function."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from tqdm import tqdm

import bilevel as bl


def distil(
    problem: Callable[[Any], bl.Problem],
    solver: Any,
    setup: Any,
    start: dict[str, np.ndarray],
    labels: np.ndarray,
    real: tuple[np.ndarray, np.ndarray],
    judge: Callable[[Any], float],
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the history and the images."""
    losses = problem(jnp)
    optimizer, outer_optimizer = optax.adam(setup.lr), optax.adam(setup.outer_lr)

    def outer_step(real: Any, state: Any, _: None) -> tuple[Any, Any]:
        weights, moments, images, outer_moments = state

        def inner_step(state: Any, _: None) -> tuple[Any, None]:
            weights, moments = state
            grads = jax.grad(losses.inner)(weights, images, labels)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(weights, updates), moments), None

        (weights, moments), _ = jax.lax.scan(inner_step, (weights, moments), length=setup.inner_steps)
        hg = bl.hypergradient(losses, weights, images, inner_args=(labels,), outer_args=real, solver=solver)
        updates, outer_moments = outer_optimizer.update(hg.grad, outer_moments)
        return (weights, moments, optax.apply_updates(images, updates), outer_moments), (hg.value, hg.info.status)

    @jax.jit
    def steps(state: Any, real: Any) -> tuple[Any, Any]:
        return jax.lax.scan(partial(outer_step, real), state, length=setup.every)

    began, rows, unsolved = time.process_time(), [], 0
    labels, real, weights = jax.tree.map(jnp.asarray, (labels, real, start))
    images = jnp.zeros_like(real[0][:10])
    state = weights, optimizer.init(weights), images, outer_optimizer.init(images)
    for step in tqdm(range(setup.every, setup.steps + 1, setup.every), "jax"):
        state, (values, statuses) = steps(state, real)
        unsolved += int((statuses != bl.Status.CONVERGED).sum())  # in jit, only the status tells
        rows.append({"step": step, "val_loss": float(values[-1]), "test_accuracy": judge(state[0])})
    seconds = round(time.process_time() - began, 2)
    difference = from_torch(problem, state[0], state[2], labels, real, solver)
    result = {"hparams": images.size, **rows[-1], "unsolved": unsolved, "difference_from_torch": difference}
    return {"rows": rows, "cpu_seconds": seconds, "result": result}, np.asarray(state[2])


def from_torch(problem: Callable[[Any], bl.Problem], *point: Any) -> float:
    """Return the relative difference between the hypergradients of JAX and of PyTorch at the same point."""
    *arrays, solver = point
    tensors = jax.tree.map(lambda a: torch.tensor(np.asarray(a)), arrays)
    grads = []
    for xp, (weights, images, labels, real) in ((jnp, arrays), (torch, tensors)):
        hg = bl.hypergradient(problem(xp), weights, images, inner_args=(labels,), outer_args=real, solver=solver)
        grads.append(np.asarray(hg.grad))
    return float(np.linalg.norm(grads[0] - grads[1]) / np.linalg.norm(grads[0]))
