"""Stop a tuning run at any moment, even by SIGKILL, and resume it: it ends with the same bits.

    python examples/pytorch/resumable.py --checkpoint run.pt     # again, after a kill, to go on

A decay for each weight of a network with dropout, trained on mini-batches. A checkpoint holds everything that the next
step depends on, the solver's memory included (the last adjoints, the prepared step size): leave out any one of them,
and the run ends elsewhere.
"""

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch
from bilevel.demo.data import load

BATCH, INNER_STEPS = 50, 5
SOLVER = {"name": "neumann", "terms": 10, "damping": 1.0}


class RandomState:
    """PyTorch's random numbers, which dropout draws, with the two methods that all parts of a checkpoint have."""

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])


class Run:
    """A network, its decays, and what moves them."""

    def __init__(self, seed: int = 0, solver: Any = SOLVER) -> None:
        torch.manual_seed(seed)
        self.seed, self.step = seed, 0
        self.train, self.val, _ = (
            (torch.as_tensor(part.X, dtype=torch.float32), torch.as_tensor(part.y)) for part in load(seed)
        )
        net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 10))
        decays = nn.ParameterList(torch.full_like(w, -6.0) for w in net.parameters())
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        self.net, self.decays, self.optimizer = net, decays, optimizer
        self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.9)
        self.outer_optimizer = torch.optim.Adam(decays, lr=0.1)
        self.solver = bl.WarmStart(solver, extrapolate=True, prepare_every=4)

    @property
    def parts(self) -> dict[str, Any]:
        """Return all that the next step depends on, except its number."""
        names = ("net", "decays", "optimizer", "scheduler", "outer_optimizer", "solver")
        return {name: getattr(self, name) for name in names} | {"random": RandomState()}

    def inner_loss(self) -> torch.Tensor:
        """Return the loss of the next mini-batch: of an order that depends on the seed and the epoch alone."""
        images, labels = self.train
        epoch, i = divmod(self.step * INNER_STEPS, len(labels) // BATCH)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed + epoch))
        rows = order[i * BATCH :][:BATCH]
        penalty = sum((d.exp() * w**2).sum() for d, w in zip(self.decays, self.net.parameters(), strict=True))
        return cross_entropy(self.net(images[rows]), labels[rows]) + penalty

    def advance(self) -> float:
        """Train for some steps, then move the decays; return the validation loss."""
        for _ in range(INNER_STEPS):
            self.optimizer.zero_grad()
            self.inner_loss().backward()
            self.optimizer.step()
            self.scheduler.step()
        self.outer_optimizer.zero_grad()
        val_loss = cross_entropy(self.net(self.val[0]), self.val[1])
        hg = bilevel_torch.backward(self.inner_loss(), val_loss, self.net.parameters(), self.decays, solver=self.solver)
        self.outer_optimizer.step()
        self.step += 1
        return float(hg.value)

    def state(self) -> dict[str, Any]:
        """Return the checkpoint."""
        return {"step": self.step, **{name: part.state_dict() for name, part in self.parts.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.step = state["step"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def digest(self) -> str:
        """Return a fingerprint of the result."""
        tensors = [*self.net.parameters(), *self.decays]
        return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def save(state: dict[str, Any], path: Path) -> None:
    """Write a file. If the process is killed during the write, the old file stays."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main(argv: list[str] | None = None) -> str:
    """Run to the end, from the checkpoint if there is one; return the digest."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--config", metavar="FILE.toml", default=SOLVER, help="a file with a table [solver]")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    run = Run(arguments.seed, arguments.config)
    if arguments.checkpoint.exists():
        run.load(torch.load(arguments.checkpoint, weights_only=True))
    while run.step < arguments.steps:
        val_loss = run.advance()
        print(f"step {run.step}: validation loss {val_loss:.4f}", flush=True)
        save(run.state(), arguments.checkpoint)
    print("digest", run.digest())
    return run.digest()


if __name__ == "__main__":
    main()
