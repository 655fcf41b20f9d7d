"""A decay for each weight of a network, tuned while it trains, in a LightningModule.

    python examples/pytorch/lightning_module.py --config examples/solver.toml

With ``--out FOLDER`` the run leaves a checkpoint, from which ``--resume FOLDER/tuned.ckpt --epochs 120`` goes on.
"""

import argparse
import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
import bilevel_torch
from bilevel.demo.data import load

TUNE_FROM = 40  # epochs: far from a minimum, the Hessian has negative eigenvalues
SOLVER = {"name": "cg", "damping": 0.1, "maxiter": 20, "rtol": 1e-2}


class Classifier(L.LightningModule):
    """A small network, and the logarithm of a decay for each of its weights."""

    def __init__(self, solver: dict[str, Any] | str = SOLVER, tune: bool = True, every: int = 3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        # Not self.hparams: that name is Lightning's, for what save_hyperparameters() has saved.
        self.log_decays = nn.ParameterList(torch.full_like(w, -7.0) for w in self.net.parameters())
        self.solver = bl.WarmStart(solver)
        self.tune, self.every = tune, every

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.net.parameters(), lr=3e-3), torch.optim.Adam(self.log_decays, lr=0.1)]

    def inner_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        decay = sum((d.exp() * w**2).sum() for d, w in zip(self.log_decays, self.net.parameters(), strict=True))
        return cross_entropy(self.net(x), y) + decay

    def training_step(self, batch: dict[str, list[torch.Tensor]], batch_idx: int) -> None:
        optimizer, outer_optimizer = self.optimizers()
        loss = self.inner_loss(*batch["train"])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss, prog_bar=True)

        if self.tune and self.current_epoch >= TUNE_FROM and batch_idx % self.every == 0:
            x, y = batch["val"]
            inner, outer = self.inner_loss(*batch["train"]), cross_entropy(self.net(x), y)
            outer_optimizer.zero_grad()  # manual_backward has left the training loss's gradient there
            bilevel_torch.backward(inner, outer, self.net.parameters(), self.log_decays, solver=self.solver)
            outer_optimizer.step()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        part, logits = ("val", "test")[dataloader_idx], self.net(x)
        scores = {"loss": cross_entropy(logits, y), "accuracy": (logits.argmax(1) == y).float().mean()}
        self.log_dict({f"{part} {k}": v for k, v in scores.items()}, prog_bar=True, add_dataloader_idx=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bilevel"] = self.solver.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.solver.load_state_dict(checkpoint["bilevel"])


def train(arguments: argparse.Namespace, tune: bool) -> dict[str, float]:
    """Train one network; return its losses and accuracies."""
    L.seed_everything(arguments.seed, verbose=False)
    training, *held_out = (
        TensorDataset(torch.as_tensor(part.X, dtype=torch.float32), torch.as_tensor(part.y))
        for part in load(arguments.seed)
    )
    # Always in the same order, so that a run that resumes is the run that went on.
    loaders = {"train": DataLoader(training, batch_size=100), "val": DataLoader(held_out[0], batch_size=350)}
    held_out = [DataLoader(part, batch_size=1000) for part in held_out]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(accelerator="cpu", max_epochs=arguments.epochs, check_val_every_n_epoch=10, **quiet)
    model, resume = Classifier(arguments.config, tune), arguments.resume if tune else None
    trainer.fit(model, CombinedLoader(loaders, "max_size_cycle"), held_out, ckpt_path=resume)
    if arguments.out and tune:
        trainer.save_checkpoint(f"{arguments.out}/tuned.ckpt")
    by_loader = trainer.validate(model, held_out, verbose=False)
    return {name: score for scores in by_loader for name, score in scores.items()}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train with the decays as they start, then with tuned ones; return what the table shows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", metavar="FILE.toml", default=SOLVER, help="a file with a table [solver]")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FOLDER", help="for the checkpoint of the tuned run")
    parser.add_argument("--resume", metavar="FILE.ckpt", help="a checkpoint for the tuned run to go on from")
    arguments = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    runs = {"untuned": train(arguments, tune=False), "tuned": train(arguments, tune=True)}
    print(f"{'':20}{'untuned':>10}{'tuned':>10}")
    for score in runs["tuned"]:
        print(f"{score:20}{runs['untuned'][score]:10.4f}{runs['tuned'][score]:10.4f}")
    return {f"{run}, {name}": score for run, scores in runs.items() for name, score in scores.items()}


if __name__ == "__main__":
    main()
