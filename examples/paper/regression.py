"""Housing prices and diabetes: a linear model or a network, with a weight decay for each weight."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import mse_loss

import bilevel as bl
from data import housing
from optimum import newton, optimum

LOG_DECAY = -7.0  # of the published code
BACKEND = bl.get_backend("torch")


def predict(params: Any, log_decay: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a network with tanh between its layers, if it has several."""
    for layer in range(len(params) // 2):
        x = (x.tanh() if layer else x) @ params[f"weight {layer}"] + params[f"bias {layer}"]
    return x[:, 0]


def decay(params: Any, log_decay: Any) -> torch.Tensor:
    """Return the penalty."""
    return sum((log_decay[name].exp() * params[name] ** 2).sum() for name in params)


def outer(params: Any, log_decay: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the validation loss."""
    return mse_loss(predict(params, log_decay, x), y)


GAUSS_NEWTON = bl.Problem.from_model(predict, mse_loss, outer, penalty=decay)
PROBLEM = bl.Problem(GAUSS_NEWTON.inner, outer)


class Setting(NamedTuple):
    """Data, and a model, for example at its optimum."""

    train: tuple[torch.Tensor, ...]
    validation: tuple[torch.Tensor, ...]
    params: dict[str, torch.Tensor]
    log_decay: dict[str, torch.Tensor]

    def hypergradient(self, solver: Any, problem: Any = PROBLEM, dtype: Any = torch.float64) -> tuple[Any, Any]:
        """Return a hypergradient and how it was found. Ignore failures: the comparison is to show them."""
        train, validation = (tuple(leaf.to(dtype) for leaf in data) for data in self[:2])
        params, log_decay = ({name: leaf.to(dtype) for name, leaf in tree.items()} for tree in self[2:])
        call = {"inner_args": train, "outer_args": validation, "solver": solver, "on_failure": "ignore"}
        hg = bl.hypergradient(problem, params, log_decay, **call)
        return BACKEND.to_flat(hg.grad), hg.info

    def linearize(self) -> tuple[np.ndarray, np.ndarray, Any]:
        """Return the Hessian, the right-hand side, and the hypergradient as a function of v."""
        at = PROBLEM.linearize(BACKEND, self.params, self.log_decay, self.train)
        rhs = BACKEND.outer(outer, self.params, self.log_decay, self.validation).grad_params
        return (
            BACKEND.space(self.params).materialise(at.vjp_params).numpy(),
            BACKEND.to_flat(rhs),
            lambda v: -BACKEND.to_flat(at.vjp_hparams(BACKEND.from_flat(v, self.params))),
        )


def prepare(kind: str, folder: Path | None, hidden: int, seed: int) -> Setting:
    """Split and scale the data, and solve the inner problem."""
    start = begin(kind, folder, hidden, seed)
    if kind == "network":
        return start._replace(params=optimum(PROBLEM, start.params, start.log_decay, start.train))
    gtol = 1e-6 if kind == "raw" else 1e-10  # raw features have rounding to match
    return start._replace(params=newton(PROBLEM, start.params, start.log_decay, start.train, gtol))


def begin(kind: str, folder: Path | None, hidden: int, seed: int) -> Setting:
    """Split and scale the data, and draw first weights."""
    _, x, y = housing(folder)
    rng = np.random.default_rng(seed)
    order, cuts = rng.permutation(len(y)), [int(0.81 * len(y)), int(0.9 * len(y))]
    x, y = x[order], y[order]
    if kind != "raw":
        x, y = ((array - array[: cuts[0]].mean(0)) / array[: cuts[0]].std(0) for array in (x, y))
    parts = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
    train, validation, _ = (tuple(map(torch.from_numpy, part)) for part in parts)
    sizes = [x.shape[1], hidden, 1] if kind == "network" else [x.shape[1], 1]
    params = {}
    for layer, fan_in in enumerate(sizes[:-1]):
        params[f"weight {layer}"] = torch.from_numpy(rng.normal(size=(fan_in, sizes[layer + 1])) / fan_in**0.5)
        params[f"bias {layer}"] = torch.zeros(sizes[layer + 1], dtype=torch.float64)
    log_decay = {name: torch.full_like(leaf, LOG_DECAY) for name, leaf in params.items()}
    return Setting(train, validation, params, log_decay)
