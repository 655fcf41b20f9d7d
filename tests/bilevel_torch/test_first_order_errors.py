"""Mistakes with `bilevel_torch.FirstOrder`: the messages name the culprit and the way out."""

import re

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from first_order_cases import SGD, regression

import bilevel as bl
import bilevel_torch

RANDOM = np.random.default_rng(0)
ERRORS = {
    "another optimizer": (
        lambda net, w, inner, outer: {"preconditioner": torch.optim.SGD(net.parameters(), 0.1)},
        "that trains the module, got SGD. Leave it out",
    ),
    "an optimizer before its first step": (
        lambda net, w, inner, outer: {"preconditioner": torch.optim.Adam(net.parameters())},
        "preconditioner: the optimizer has taken no step",
    ),
    "an optimizer of something else": (
        lambda net, w, inner, outer: {"preconditioner": torch.optim.Adam([w])},
        "preconditioner: the optimizer does not train all parameters",
    ),
    "both": (
        lambda net, w, inner, outer: {"preconditioner": torch.optim.Adam(net.parameters()), "optimizer": SGD},
        "pass either an optimizer, to track v, or a preconditioner",
    ),
    "an optimizer object": (
        lambda net, w, inner, outer: {"optimizer": torch.optim.SGD(net.parameters(), 0.1)},
        "optimizer: expected a function from a list of tensors to an optimizer of torch.optim",
    ),
    "perturbation": (
        lambda net, w, inner, outer: {"perturbation": -1.0},
        "FirstOrder.perturbation: expected a finite number > 0",
    ),
    "steps without an optimizer": (
        lambda net, w, inner, outer: {"steps": 3},
        "FirstOrder.steps: only a tracked v takes steps",
    ),
    "steps": (lambda net, w, inner, outer: {"steps": 0}, "FirstOrder.steps: expected an integer >= 1"),
    "no module": (
        lambda net, w, inner, outer: {"module": net.parameters()},
        "module: expected the torch.nn.Module that the losses run, got generator",
    ),
    "frozen": (
        lambda net, w, inner, outer: {"module": net.requires_grad_(False)},
        "module: it has no parameters that require gradients",
    ),
    "no gradient": (
        lambda net, w, inner, outer: {"hparams": {"a": w.detach()}},
        "hparams['a'] does not require a gradient: call requires_grad_",
    ),
    "a tensor twice": (
        lambda net, w, inner, outer: {"hparams": [w, w]},
        "hparams[1] is the same tensor as hparams[0]",
    ),
    "computed": (
        lambda net, w, inner, outer: {"hparams": [w.exp()]},
        "hparams[0] is computed from other tensors. Pass these",
    ),
    "a tensor": (
        lambda net, w, inner, outer: {"inner": inner()},
        "inner: expected a function without arguments, got Tensor. Pass the function",
    ),
    "a float": (
        lambda net, w, inner, outer: {"inner": lambda: 1.0},
        "inner: expected a function that returns a scalar tensor, got float",
    ),
    "a vector": (
        lambda net, w, inner, outer: {"outer": lambda: outer() * torch.ones(3)},
        "outer: expected a scalar loss, got the shape (3,). Take its mean",
    ),
    "detached": (
        lambda net, w, inner, outer: {"outer": lambda: outer().detach()},
        "outer returned a loss without a graph",
    ),
    "another batch": (
        lambda net, w, inner, outer: {"inner": lambda: inner() * RANDOM.uniform(1, 2)},
        "for the same weights and random state. It must compute the same loss each time",
    ),
    "no hparams": (lambda net, w, inner, outer: {"inner": outer}, "Neither inner nor outer depends on hparams"),
    "inner without module": (
        lambda net, w, inner, outer: {"inner": lambda: (w**2).sum()},
        "inner does not depend on the trained parameters of the module",
    ),
    "outer without module": (
        lambda net, w, inner, outer: {"outer": lambda: (w**2).sum()},
        "outer does not depend on the trained parameters of the module",
    ),
    "no losses": (lambda net, w, inner, outer: {"outer": []}, "outer: the list of functions is empty"),
}


def test_a_hyperparameter_without_influence_is_named_once():
    net, weights, inner, outer = regression()
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    first_order = bilevel_torch.FirstOrder(net, {"weights": weights, "unused": unused})
    with pytest.warns(bl.DependenceWarning, match=r"Neither outer nor .* depends on hparams\['unused'\]"):
        first_order.backward(inner, outer)
    first_order.backward(inner, outer)
    assert torch.equal(unused.grad, torch.zeros_like(unused))


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_cause(case):
    change, message = ERRORS[case]
    given = dict(zip(("module", "hparams", "inner", "outer"), regression(), strict=True))
    given |= change(*given.values())
    losses = given.pop("inner"), given.pop("outer")
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        bilevel_torch.FirstOrder(**given).backward(*losses)


def test_a_state_of_another_module_is_an_error():
    net, weights, *_ = regression()
    tracked = bilevel_torch.FirstOrder(net, weights, optimizer=SGD)
    with pytest.raises(ValueError, match="its v has 0 tensors, and this FirstOrder has 4"):
        tracked.load_state_dict(bilevel_torch.FirstOrder(net, weights).state_dict())
