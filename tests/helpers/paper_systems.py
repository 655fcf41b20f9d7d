"""What holds of each of the paper's systems, run small: it reads what it has stored, and has a report."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from dense import by_torch
from frameworks import EXAMPLES, relative_error

import bilevel as bl


def paper(name: str) -> ModuleType:
    """Import one of the paper's systems."""
    if str(EXAMPLES / "paper") not in sys.path:
        sys.path.insert(0, str(EXAMPLES / "paper"))
    return importlib.import_module(name)


def check_stored(system: ModuleType, command: list[str], histories: Any) -> None:
    """Check that a second call reads the histories, and makes none of them again."""
    files = list(Path(command[command.index("--out") + 1]).rglob("*.json"))
    written = [file.stat().st_mtime_ns for file in files]
    assert len(files) == len(histories)
    assert system.main(command) == histories
    assert [file.stat().st_mtime_ns for file in files] == written


def report_of(system: ModuleType, histories: Any, folder: Path) -> str:
    """Return what a page says of it, its row of the table and its section, and check that there is a picture, too."""
    report = paper(f"report.{system.__name__}")
    title, theirs, ours = report.row(histories)
    assert all(isinstance(text, str) and text for text in (title, theirs, ours))
    section = report.section(histories, folder)
    assert (folder / f"{system.__name__}.png").stat().st_size > 0
    return f"| {title} | {theirs} | {ours} |\n\n{section}"


def check_augmentation(augment: Any, noise: Any) -> None:
    """Check the hypergradient of an augmentation of twelve images against the dense Hessian, in float64."""
    import torch

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).double()
    problem = paper("augmentation").problem_of(model, augment, decay=0.1)
    x, y = torch.rand(12, 1, 4, 4).double(), torch.arange(12) % 3
    params, hparams = dict(model.named_parameters()), dict(augment.named_parameters())
    losses = problem.inner(params, hparams, x, y, noise), problem.outer(params, hparams, 1 - x, y)
    expected = by_torch(*losses, params.values(), hparams.values())
    data = {"inner_args": (x, y, noise), "outer_args": (1 - x, y)}
    hg = bl.hypergradient(problem, params, hparams, solver={"name": "cg", "maxiter": 500, "rtol": 1e-10}, **data)
    assert np.linalg.norm(expected) > 0
    assert relative_error(np.concatenate([grad.numpy().ravel() for grad in hg.grad.values()]), expected) < 1e-7
