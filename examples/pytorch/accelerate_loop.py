"""A weight for each training example, tuned on clean validation data, in a loop of Hugging Face Accelerate.

    python examples/pytorch/accelerate_loop.py --config examples/solver.toml

Two fifths of the training labels are wrong; the weights learn which. With ``--out FOLDER`` the run leaves its state
there, from which ``--resume FOLDER/epoch_100 --epochs 120`` goes on.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
import bilevel_torch
from bilevel.demo.data import load

WRONG = 0.4  # of the training labels
TUNE_FROM = 20  # epochs: far from a minimum, the Hessian has negative eigenvalues
SOLVER = {"name": "cg", "damping": 0.1, "maxiter": 20, "rtol": 1e-2}


class Weights(nn.Module):
    """A weight from 0 to 2 for each example: 1 for all at first."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(examples))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return 2 * self.logits[index].sigmoid()


def train(arguments: argparse.Namespace, tune: bool) -> dict[str, float]:
    """Train one network; return its losses and accuracies, and the weights of right and wrong examples."""
    accelerator = Accelerator(cpu=True, mixed_precision=arguments.precision)
    set_seed(arguments.seed)
    (x, y), val, test = (
        (torch.as_tensor(part.X, dtype=torch.float32), torch.as_tensor(part.y)) for part in load(arguments.seed)
    )
    wrong = torch.rand(len(y)) < WRONG
    y = torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y)
    examples = TensorDataset(x, y, torch.arange(len(y)))

    net, weights = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), Weights(len(y))
    net, weights, optimizer, outer_optimizer, batches, whole, val_batches = accelerator.prepare(
        net,
        weights,
        torch.optim.Adam(net.parameters(), lr=3e-3),
        torch.optim.Adam(weights.parameters(), lr=0.1),
        DataLoader(examples, batch_size=100, shuffle=True),
        DataLoader(examples, batch_size=len(examples)),
        DataLoader(TensorDataset(*val), batch_size=len(val[1])),
    )
    # Accelerate compiles if an earlier Accelerator in this process did, and compiled modules have no second derivative.
    bare_net, bare_weights = (accelerator.unwrap_model(part, keep_torch_compile=False) for part in (net, weights))
    solver = bl.WarmStart(arguments.config)
    accelerator.register_for_checkpointing(solver)
    first = 0
    if arguments.resume and tune:
        accelerator.load_state(arguments.resume)
        first = int(Path(arguments.resume).name.removeprefix("epoch_"))

    def inner_loss(net: nn.Module, weights: nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor):
        decay = 1e-3 * sum((w**2).sum() for w in net.parameters())
        return (weights(index) * cross_entropy(net(x), y, reduction="none")).mean() + decay

    with tqdm(range(first, arguments.epochs), unit="epoch") as bar:
        for epoch in bar:
            for batch in batches:
                optimizer.zero_grad()
                loss = inner_loss(net, weights, *batch)
                accelerator.backward(loss)
                optimizer.step()
            # Of all data: the Hessian of a batch, with labels learned by heart, is not positive definite here.
            for batch, (x_val, y_val) in zip(whole, val_batches, strict=True):
                with accelerator.autocast():  # by the bare modules, which DistributedDataParallel would have wrapped
                    inner, outer = inner_loss(bare_net, bare_weights, *batch), cross_entropy(bare_net(x_val), y_val)
                if tune and epoch >= TUNE_FROM:
                    outer_optimizer.zero_grad()  # accelerator.backward has left the training loss's gradient there
                    bilevel_torch.backward(inner, outer, net.parameters(), weights.parameters(), solver=solver)
                    outer_optimizer.step()
            bar.set_postfix(train=f"{loss:.3f}", val=f"{outer:.3f}")
    if arguments.out and tune:
        accelerator.save_state(f"{arguments.out}/epoch_{arguments.epochs}")

    scores = {}
    with torch.no_grad():
        for name, (x_part, y_part) in (("val", val), ("test", test)):
            logits = net(x_part)
            scores[f"{name} loss"] = float(cross_entropy(logits, y_part))
            scores[f"{name} accuracy"] = float((logits.argmax(1) == y_part).float().mean())
        found = bare_weights(torch.arange(len(y)))
    return scores | {"weight of the right": float(found[~wrong].mean()), "of the wrong": float(found[wrong].mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train with all weights equal, then with tuned ones; return what the table shows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", metavar="FILE.toml", default=SOLVER, help="a file with a table [solver]")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="as Accelerate calls it")
    parser.add_argument("--out", metavar="FOLDER", help="for the state of the tuned run")
    parser.add_argument("--resume", metavar="FOLDER", help="a state for the tuned run to go on from")
    arguments = parser.parse_args(argv)
    runs = {"untuned": train(arguments, tune=False), "tuned": train(arguments, tune=True)}
    print(f"{'':20}{'untuned':>10}{'tuned':>10}")
    for score in runs["tuned"]:
        print(f"{score:20}{runs['untuned'][score]:10.4f}{runs['tuned'][score]:10.4f}")
    return {f"{run}, {name}": score for run, scores in runs.items() for name, score in scores.items()}


if __name__ == "__main__":
    main()
