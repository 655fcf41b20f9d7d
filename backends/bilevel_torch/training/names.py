"""The weights that an optimizer trains, by their names in a model."""

import torch
from torch import nn


def trained_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of the weights that require gradients, for each parameter group.

    Raises:
        TypeError: for complex weights.
        ValueError: for a weight that is not in the model, or if all are frozen.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    trained: list[list[str]] = []
    for i, group in enumerate(optimizer.param_groups):
        params = [p for p in group["params"] if p.requires_grad]
        for param in params:
            if id(param) not in names:
                raise ValueError(
                    f"optimizer: param group {i} has a parameter of shape {tuple(param.shape)} that is not in the "
                    "model. Put the model and the owner of the parameter into one module, for example an nn.ModuleDict."
                )
            if param.is_complex():
                raise TypeError(f"{names[id(param)]}: complex weights are not supported. Train their real view.")
        trained.append([names[id(param)] for param in params])
    if not any(trained):
        raise ValueError("optimizer: none of its parameters requires a gradient, so a step changes nothing.")
    return trained


def check_modules(model: nn.Module) -> None:
    """Check that each module of a model has a state that steps can carry.

    Raises:
        TypeError: for SyncBatchNorm and DistributedDataParallel.
        ValueError: for a lazy module that has not run.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise TypeError(
                f"{name}: the statistics of SyncBatchNorm have no derivative. Use BatchNorm, or freeze it first."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"{name or 'model'}: DistributedDataParallel would not average the gradients that a training step "
                "computes. Pass its attribute `module`, and train on all examples in each process."
            )
    for name, param in model.named_parameters():
        if isinstance(param, nn.UninitializedParameter):
            raise ValueError(f"{name} has no shape yet. Run the model once on a batch, then construct the optimizer.")
