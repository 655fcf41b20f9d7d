"""Clean a training set: a weight for each training example, tuned on a small clean validation set, in a plain loop.

    python examples/pytorch/plain_loop.py --config examples/solver.toml

Two fifths of the labels of scikit-learn's digits are wrong. Training fits them; with a weight for each example, tuned
by its hypergradient, it learns to leave them out. Three lines do it: the hyperparameters, their optimizer, and
`bilevel_torch.backward`.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import bilevel as bl
import bilevel_torch
from bilevel.demo.data import load

WRONG = 0.4  # of the training labels
INNER_STEPS = 10  # of training, for each step of the hyperparameters
SOLVER = {"name": "cg", "damping": 0.1, "maxiter": 20, "rtol": 1e-2}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train with all weights equal, then with tuned ones; return what the table shows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", metavar="FILE.toml", default=SOLVER, help="a file with a table [solver]")
    parser.add_argument("--steps", type=int, default=60, help="of the hyperparameters")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    torch.manual_seed(arguments.seed)
    train, val, test = (
        (torch.as_tensor(part.X, dtype=torch.float32), torch.as_tensor(part.y)) for part in load(arguments.seed)
    )
    val = (val[0][:100], val[1][:100])
    wrong = torch.rand(len(train[1])) < WRONG
    train = (train[0], torch.where(wrong, torch.randint_like(train[1], 10), train[1]))

    results = {}
    for name, tune in (("equal weights", False), ("tuned weights", True)):
        net, weights = run(train, val, arguments, tune)
        for part, data in (("validation", val), ("test", test)):
            results[f"{name}, {part} loss"], results[f"{name}, {part} accuracy"] = evaluate(net, data)
    results["weight of the right"] = float(weights[~wrong].sigmoid().mean())
    results["weight of the wrong"] = float(weights[wrong].sigmoid().mean())
    for name, value in results.items():
        print(f"{name:<36}{value:8.3f}")
    return results


def run(train: tuple, val: tuple, arguments: argparse.Namespace, tune: bool) -> tuple[nn.Module, torch.Tensor]:
    """Return a trained network and the logits of the weights that it was trained with."""
    torch.manual_seed(arguments.seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps * INNER_STEPS)
    weights = torch.zeros(len(train[1]), requires_grad=True)  # hyperparameters: any tensor in the graph of a loss
    outer_optimizer = torch.optim.Adam([weights], lr=0.3)
    solver = bl.WarmStart(arguments.config)

    def inner_loss() -> torch.Tensor:
        losses = cross_entropy(net(train[0]), train[1], reduction="none")
        decay = 1e-3 * sum((w**2).sum() for w in net.parameters())
        return (weights.sigmoid() * losses).mean() + decay

    with tqdm(range(arguments.steps), unit="step") as bar:
        for _ in bar:
            for _ in range(INNER_STEPS):
                optimizer.zero_grad()
                loss = inner_loss()
                loss.backward()
                optimizer.step()
                scheduler.step()
            val_loss = cross_entropy(net(val[0]), val[1])
            if tune:
                outer_optimizer.zero_grad()
                bilevel_torch.backward(inner_loss(), val_loss, net.parameters(), weights, solver=solver)
                outer_optimizer.step()
            bar.set_postfix(train=f"{loss:.3f}", val=f"{val_loss:.3f}")
    return net, weights.detach()


@torch.no_grad()
def evaluate(net: nn.Module, data: tuple) -> tuple[float, float]:
    """Return loss and accuracy."""
    logits = net(data[0])
    return float(cross_entropy(logits, data[1])), float((logits.argmax(1) == data[1]).float().mean())


if __name__ == "__main__":
    main()
