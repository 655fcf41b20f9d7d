"""A network that weighs the training examples, tuned on clean validation data, in a loop of Lightning Fabric.

    python examples/pytorch/fabric_loop.py --config examples/solver.toml

Two fifths of the training labels are wrong. The hyperparameters are the parameters of a small module that says how
much to trust a label, given the picture. With ``--out FOLDER`` the run leaves a checkpoint, from which
``--resume FOLDER/tuned.ckpt --epochs 120`` goes on.
"""

import argparse

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import bilevel as bl
import bilevel_torch
from bilevel.demo.data import load

WRONG = 0.4  # of the training labels
TUNE_FROM = 20  # epochs: far from a minimum, the Hessian has negative eigenvalues
SOLVER = {"name": "cg", "damping": 0.1, "maxiter": 20, "rtol": 1e-2}


class Trust(nn.Module):
    """A weight from 0 to 2 for each example: 1 for all at first."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(64, 10)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2 * self.score(x).gather(1, y[:, None]).squeeze(1).sigmoid()


def train(arguments: argparse.Namespace, tune: bool) -> dict[str, float]:
    """Train one network; return its losses and accuracies, and the weights of right and wrong examples."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=arguments.precision)
    fabric.launch()
    fabric.seed_everything(arguments.seed, verbose=False)
    (x, y), val, test = (
        (torch.as_tensor(part.X, dtype=torch.float32), torch.as_tensor(part.y)) for part in load(arguments.seed)
    )
    wrong = torch.rand(len(y)) < WRONG
    y = torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y)
    # Always in the same order, so that a run that resumes is the run that went on.
    batches, whole, val_batches = fabric.setup_dataloaders(
        DataLoader(TensorDataset(x, y), batch_size=100),
        DataLoader(TensorDataset(x, y), batch_size=len(y)),
        DataLoader(TensorDataset(*val), batch_size=len(val[1])),
    )

    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    net, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=3e-3))
    trust = Trust()
    trust, outer_optimizer = fabric.setup(trust, torch.optim.Adam(trust.parameters(), lr=0.01))
    solver = bl.WarmStart(arguments.config)
    state = {"net": net, "trust": trust, "optimizer": optimizer, "outer_optimizer": outer_optimizer, "solver": solver}
    state["epoch"] = 0
    if arguments.resume and tune:
        fabric.load(arguments.resume, state)

    def inner_loss(net: nn.Module, trust: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        decay = 1e-3 * sum((w**2).sum() for w in net.parameters())
        return (trust(x, y) * cross_entropy(net(x), y, reduction="none")).mean() + decay

    with tqdm(range(state["epoch"], arguments.epochs), unit="epoch") as bar:
        for state["epoch"] in bar:
            for batch in batches:
                optimizer.zero_grad()
                loss = inner_loss(net, trust, *batch)
                fabric.backward(loss)
                optimizer.step()
            # Of all data: the Hessian of a batch, with labels learned by heart, is not positive definite here.
            for batch, (x_val, y_val) in zip(whole, val_batches, strict=True):
                with fabric.autocast():  # by the bare modules: a wrapped one insists on fabric.backward(loss)
                    inner, outer = inner_loss(net.module, trust.module, *batch), cross_entropy(net.module(x_val), y_val)
                if tune and state["epoch"] >= TUNE_FROM:
                    outer_optimizer.zero_grad()  # fabric.backward has left the training loss's gradient there
                    bilevel_torch.backward(inner, outer, net.parameters(), trust.parameters(), solver=solver)
                    outer_optimizer.step()
            bar.set_postfix(train=f"{loss:.3f}", val=f"{outer:.3f}")
    state["epoch"] = arguments.epochs
    if arguments.out and tune:
        fabric.save(f"{arguments.out}/tuned.ckpt", state)

    scores = {}
    with torch.no_grad():
        for name, (x_part, y_part) in (("val", val), ("test", test)):
            logits = net(x_part)
            scores[f"{name} loss"] = float(cross_entropy(logits, y_part))
            scores[f"{name} accuracy"] = float((logits.argmax(1) == y_part).float().mean())
        weights = trust(x, y)
    return scores | {"weight of the right": float(weights[~wrong].mean()), "of the wrong": float(weights[wrong].mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train with all weights equal, then with tuned ones; return what the table shows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", metavar="FILE.toml", default=SOLVER, help="a file with a table [solver]")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="32-true", help="as Fabric calls it: bf16-mixed, say")
    parser.add_argument("--out", metavar="FOLDER", help="for the checkpoint of the tuned run")
    parser.add_argument("--resume", metavar="FILE.ckpt", help="a checkpoint for the tuned run to go on from")
    arguments = parser.parse_args(argv)
    runs = {"untuned": train(arguments, tune=False), "tuned": train(arguments, tune=True)}
    print(f"{'':20}{'untuned':>10}{'tuned':>10}")
    for score in runs["tuned"]:
        print(f"{score:20}{runs['untuned'][score]:10.4f}{runs['tuned'][score]:10.4f}")
    return {f"{run}, {name}": score for run, scores in runs.items() for name, score in scores.items()}


if __name__ == "__main__":
    main()
