"""`bilevel_torch.trainers.lightning`: the callback does what a loop by hand does, and resumes."""

from copy import deepcopy

import pytest

pytest.importorskip("torch")
pytest.importorskip("lightning")

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel_torch
from bilevel_torch.data import DataWeights
from bilevel_torch.trainers.lightning import HypergradientCallback

# Lightning's own use of torch.utils._pytree, in CombinedLoader.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
X = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
Y = (X[..., :1] + X[..., 1:2]).sin()
SOURCE = torch.arange(16) % 2


class Regression(L.LightningModule):
    """A network with a weight for each of two sources."""

    def __init__(self, make=torch.optim.Adam, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        self.weights, self.make, self.automatic_optimization = DataWeights(2), make, not manual
        self.dtypes = set()

    def train_loss(self, batch):
        x, y, source = batch
        predicted = self.net(x)
        self.dtypes.add(predicted.dtype)
        return (self.weights(source) * ((predicted - y) ** 2)[:, 0]).mean()

    def val_loss(self, batch):
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def training_step(self, batch, batch_idx):
        return self.train_loss(batch)

    def configure_optimizers(self):
        return self.make(self.net.parameters(), lr=0.05)


def loader():
    return DataLoader(TensorDataset(X[0], Y[0] + SOURCE[:, None], SOURCE), batch_size=4)


def validation():
    data = TensorDataset(X[1], Y[1])
    return DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))


def callback(module, every=2, batches=None):
    return HypergradientCallback(
        module.weights.parameters(),
        Regression.train_loss,
        Regression.val_loss,
        batches or validation(),
        every=every,
    )


def trainer(calls, epochs=2, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=calls, **(quiet | options))


def by_hand(make, accumulate):
    """Return the scores, and the network's weights, of a loop without Lightning."""
    module = Regression(make)
    optimizer = module.configure_optimizers()
    outer_optimizer = torch.optim.Adam(module.weights.parameters(), 0.1)
    first_order = bilevel_torch.FirstOrder(
        module, module.weights.parameters(), preconditioner=optimizer if make is torch.optim.Adam else None
    )
    held = validation()
    batches = [batch for _ in range(2) for batch in loader()]
    others = [batch for _ in range(4) for batch in held]
    for step in range(len(batches) // accumulate):
        micro_batches = batches[accumulate * step : accumulate * (step + 1)]
        optimizer.zero_grad()
        for batch in micro_batches:
            (module.train_loss(batch) / accumulate).backward()
        optimizer.step()
        if step % 2:
            inner = [lambda batch=batch: module.train_loss(batch) for batch in micro_batches]
            other = others.pop(0)
            first_order.backward(inner, lambda other=other: module.val_loss(other), accumulate=False)
            outer_optimizer.step()
    return module


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_callback_does_what_a_loop_does(make, accumulate):
    module = Regression(make)
    trainer([callback(module)], accumulate_grad_batches=accumulate).fit(module, loader())
    expected = by_hand(make, accumulate)
    assert module.weights.scores.abs().min() > 0.01
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_resumed_run_has_the_same_bits(tmp_path):
    whole = Regression()
    trainer([callback(whole, every=1)], epochs=3).fit(whole, loader())
    first = Regression()
    begun = trainer([callback(first, every=1)], epochs=1)
    begun.fit(first, loader())
    begun.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Regression()
    trainer([callback(resumed, every=1)], epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_losses_are_computed_in_the_precision_of_the_trainer():
    module = Regression()
    held = callback(module)
    run = trainer([held], precision="bf16-mixed")
    run.fit(module, loader())
    assert module.dtypes == {torch.bfloat16}
    assert run.callback_metrics["outer_loss"] > 0
    assert held.state_dict()["first_order"]["eps"] == torch.finfo(torch.bfloat16).eps


def test_second_fit_uses_its_own_optimizer():
    """Its Adam is the preconditioner. A new callback with the same state gives the same result."""
    module, held = Regression(), validation()
    first = callback(module, every=1, batches=held)
    trainer([first], epochs=1).fit(module, loader())
    copy, state = copy_of(module), deepcopy(first.state_dict())
    trainer([first], epochs=1).fit(module, loader())
    second = callback(copy, every=1)
    second.load_state_dict(state)
    trainer([second], epochs=1).fit(copy, loader())
    assert torch.equal(module.weights.scores, copy.weights.scores)


def copy_of(module):
    copy = Regression()
    copy.load_state_dict(module.state_dict())
    return copy


class Skipping(Regression):
    """A module that skips the second half of its batches."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx >= 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_skipped_batches_take_no_part():
    skipping, short = Skipping(), Regression()
    trainer([callback(skipping, every=1)], epochs=1).fit(skipping, loader())
    trainer([callback(short, every=1)], epochs=1, limit_train_batches=2).fit(short, loader())
    assert short.weights.scores.abs().min() > 0
    assert torch.equal(skipping.weights.scores, short.weights.scores)


class Greedy(Regression):
    """A module whose optimizer also has the weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_hyperparameters_in_the_optimizer_of_the_module_are_refused():
    module = Greedy()
    with pytest.raises(ValueError, match=r"configure_optimizers: .* also moves hyperparameters.*Leave them out"):
        trainer([callback(module)]).fit(module, loader())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hparams": []}, ValueError, "hparams: expected one or more tensors"),
        ({"hparams": [1.0]}, ValueError, "hparams: expected one or more tensors"),
        ({"inner": None}, TypeError, "inner: expected a function of the module and a batch, got NoneType"),
        ({"outer": 3}, TypeError, "outer: expected a function of the module and a batch, got int"),
        ({"batches": None}, TypeError, "batches: expected a loader .* got NoneType"),
        ({"optimizer": torch.optim.Adam}, TypeError, r"expected an optimizer of torch\.optim, got Adam"),
        (
            {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)])},
            ValueError,
            "does not have all of them",
        ),
    ],
)
def test_each_mistake_is_named(options, error, message):
    given = {
        "hparams": torch.zeros(2, requires_grad=True),
        "inner": Regression.train_loss,
        "outer": Regression.val_loss,
        "batches": validation(),
    }
    HypergradientCallback(**given)
    with pytest.raises(error, match=message):
        HypergradientCallback(**(given | options))


def test_manual_optimization_is_refused():
    module = Regression(manual=True)
    with pytest.raises(
        ValueError, match=r"needs automatic optimization .* call bilevel_torch.FirstOrder in training_step"
    ):
        trainer([callback(module)]).fit(module, loader())


def test_empty_loader_is_named():
    module = Regression()
    with pytest.raises(ValueError, match="batches: the loader of batches for the outer loss is empty"):
        trainer([callback(module, batches=iter(()))]).fit(module, loader())
    with pytest.raises(ValueError, match=r"HypergradientCallback\.every: expected an integer >= 1"):
        callback(module, every=0)
