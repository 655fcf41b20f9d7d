"""The errors of `bilevel_torch.backward`: each names the culprit and the way out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")

from torch_losses import X, call, losses, new_decay, small_net  # noqa: E402

nn = torch.nn


class Case(NamedTuple):
    """A mistake in the arguments of a net and a decay, and the error. ``options`` are for the call."""

    arguments: Callable[[Any, Any], tuple[Any, ...]]  # (net, decay) -> (inner_loss, outer_loss, params, hparams)
    error: type[Exception]
    text: str
    options: dict[str, Any] | None = None


def check(case):
    net, decay = small_net(), new_decay()
    arguments = case.arguments(net, decay)
    with pytest.raises(case.error, match=case.text):
        call(*arguments, **(case.options or {}))
    assert decay.grad is None


def cases(**named):
    return pytest.mark.parametrize("case", named.values(), ids=[name.replace("_", " ") for name in named])


def usual(net, decay, **replaced):
    """Return right arguments, except those that are replaced."""
    inner, outer = losses(net, decay)
    right = {"inner": inner, "outer": outer, "params": net.parameters(), "hparams": decay}
    return tuple({**right, **replaced}.values())


def inner_with(term):
    """Return arguments whose inner loss has one more term, of the net and a new hyperparameter."""

    def arguments(net, decay):
        other = torch.tensor(-1.0, requires_grad=True)
        used, passed = term(other)
        inner, outer = losses(net, decay)
        return inner + used * net[0].weight.pow(2).sum(), outer, net.parameters(), passed

    return arguments


def hooked(tensor):
    tensor.register_hook(lambda g: 2 * g)
    return tensor


def after_step(net, decay):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    inner, outer = losses(net, decay)
    inner.backward(retain_graph=True, inputs=[*net.parameters()])
    optimizer.step()
    return inner, outer, net.parameters(), decay


def freed(net, decay):
    inner, outer = losses(net, decay)
    inner.backward(inputs=[*net.parameters()])
    return inner, outer, net.parameters(), decay


def frozen_afterwards(net, decay):
    both = losses(net, decay)
    net.requires_grad_(False)  # as Lightning's toggle_optimizer does
    return *both, net.named_parameters(), decay


def with_forward(layer, x):
    """Return arguments whose net begins with a layer that changes its weights in each forward pass."""

    def arguments(_, decay):
        torch.manual_seed(0)
        net = nn.Sequential(layer(), nn.Flatten(), nn.Linear(6, 1))
        inner, outer = net(x).pow(2).mean() + losses(lambda x: x, decay, net)[0], net(x).mean()
        return inner, outer, net.parameters(), decay

    return arguments


class Clipped(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def in_inference_mode(net, decay):
    with torch.inference_mode():
        return *losses(net, decay), net.parameters(), decay


def sparse(net, decay):
    embed = nn.Embedding(3, 2, sparse=True)
    loss = embed(torch.tensor([0, 1])).pow(2).sum() * decay.exp()
    return loss, embed(torch.tensor([2])).sum(), embed.parameters(), decay


def complex_params(net, decay):
    w = {"w": nn.Parameter(torch.ones(2, dtype=torch.complex64))}
    loss = decay * w["w"].abs().pow(2).sum()
    return loss, loss, w, decay


def copies(net):
    return {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}


def used_up(net):
    parameters = net.parameters()
    list(parameters)
    return parameters


def groups(net):
    return torch.optim.AdamW([{"params": net[0].parameters()}, {"params": net[2].parameters()}]).param_groups


GROUPS = r"\[p for group in optimizer\.param_groups for p in group\['params'\]\]"
NO_GRAPH = r"has no graph.*no_grad.*An accuracy has no derivative, because argmax.*cross_entropy"
IN_PLACE = r"(?s)^A tensor changed in place.*Take the step before both losses.*Embedding\(max_norm.*inplace operation"
INFERENCE = r"inference_mode.*would be zero without an error"


@cases(
    number=Case(
        lambda net, h: usual(net, h, outer=1.0),
        TypeError,
        r"^outer_loss: expected a scalar tensor, got float\. Do not call \.item\(\) on it\.$",
    ),
    tuple=Case(
        lambda net, h: usual(net, h, outer=(net(X).mean(), {})),
        TypeError,
        r"^outer_loss: expected a scalar tensor, got tuple\. Use only the tensor of the loss\.$",
    ),
    function=Case(
        lambda net, h: usual(net, h, inner=lambda: net(X).mean()),
        TypeError,
        r"^inner_loss: expected a scalar tensor, got function\. Call it, and use its value\.$",
    ),
    module=Case(
        lambda net, h: usual(net, h, inner=nn.MSELoss()),
        TypeError,
        r"^inner_loss: expected a scalar tensor, got MSELoss\. Call it",
    ),
    per_example=Case(
        lambda net, h: usual(net, h, outer=net(X)),
        ValueError,
        r"outer_loss: expected a scalar, got an array of shape \(5, 1\)",
    ),
    detached_inner=Case(
        lambda net, h: usual(net, h, inner=net(X).mean().detach()), ValueError, f"inner_loss {NO_GRAPH}"
    ),
    detached_outer=Case(
        lambda net, h: usual(net, h, outer=net(X).mean().detach()), ValueError, f"outer_loss {NO_GRAPH}"
    ),
    accuracy=Case(
        lambda net, h: usual(net, h, outer=(net(X).argmax(1) == 0).float().mean()), ValueError, f"outer_loss {NO_GRAPH}"
    ),
    number_of_right_answers=Case(
        lambda net, h: usual(net, h, outer=(net(X).argmax(1) == 0).sum()), ValueError, f"outer_loss {NO_GRAPH}"
    ),
    inference_mode=Case(in_inference_mode, RuntimeError, INFERENCE),
    optimizer_step=Case(after_step, RuntimeError, IN_PLACE),
    max_norm=Case(
        with_forward(lambda: nn.Embedding(4, 2, max_norm=0.5), torch.tensor([[0, 1, 2], [3, 1, 0]])),
        RuntimeError,
        IN_PLACE,
    ),
    clipped_in_forward=Case(with_forward(lambda: Clipped(3, 6), X), RuntimeError, IN_PLACE),
    freed_graph=Case(
        freed, RuntimeError, r"(?s)Compute the hypergradient first.*retain_graph=True.*PyTorch: .*second time"
    ),
    sparse_gradient=Case(sparse, TypeError, r"a gradient of shape \(3, 2\) is sparse.*sparse=True"),
)
def test_losses(case):
    check(case)


@cases(
    module=Case(
        lambda net, h: usual(net, h, params=net),
        TypeError,
        r"^params is a module\. Pass its parameters\(\), or its named",
    ),
    modules=Case(
        lambda net, h: usual(net, h, params=list(net)),
        TypeError,
        r"params\[0\]: expected an array of torch, got Linear",
    ),
    function=Case(
        lambda net, h: usual(net, h, params=net.parameters),
        TypeError,
        r"^params: expected a tensor.*got method\. Call it",
    ),
    optimizer=Case(
        lambda net, h: usual(net, h, params=torch.optim.SGD(net.parameters())),
        TypeError,
        rf"^params is an optimizer\. Pass the tensors that it updates: {GROUPS}",
    ),
    groups=Case(
        lambda net, h: usual(net, h, params=groups(net)),
        TypeError,
        rf"^params: got param_groups of an optimizer, with their options\. Pass {GROUPS}",
    ),
    group=Case(lambda net, h: usual(net, h, params=groups(net)[0]), TypeError, rf"^params: got param_groups.*{GROUPS}"),
    integer=Case(
        lambda net, h: usual(
            net, h, params={**dict(net.named_parameters()), "steps": torch.zeros((), dtype=torch.int64)}
        ),
        TypeError,
        r"params\['steps'\]: expected a floating-point leaf, got torch\.int64.*Convert it, or leave it out",
    ),
    complex=Case(
        complex_params,
        TypeError,
        r"params\['w'\]: .*torch\.complex64.*imaginary parts \(torch\.view_as_real, or x\.real.*inside the losses\.$",
    ),
    none=Case(lambda net, h: usual(net, h, params=[]), ValueError, "params has no leaves"),
    used_up=Case(
        lambda net, h: usual(net, h, params=used_up(net)), ValueError, r"params: the iterator is empty\. .*one call"
    ),
    twice=Case(
        lambda net, h: usual(net, h, params=[net[0].weight, net[0].weight]),
        ValueError,
        r"params\[1\] is the same tensor as params\[0\]",
    ),
    another_module=Case(
        lambda net, h: usual(net, h, params={"weight": nn.Linear(2, 1).weight}),
        ValueError,
        r"outer_loss depends on neither params\['weight'\].* nor .*Do not detach",
    ),
    copies=Case(
        lambda net, h: usual(net, h, outer=net(X).mean() + h, params=copies(net)),
        ValueError,
        r"inner_loss does not depend on params\['0\.bias'\].*pass the module's own",
    ),
    all_frozen=Case(frozen_afterwards, ValueError, r"params\['0\.bias'\].*all frozen"),
    state_dict=Case(
        lambda net, h: usual(net, h, params=net.state_dict()),
        ValueError,
        r"params\['0\.bias'\].*all frozen.*not its state_dict\(\)",
    ),
)
def test_params(case):
    check(case)


@cases(
    detached=Case(
        lambda net, h: (*losses(net, h.detach()), net.parameters(), {"decay": h}),
        ValueError,
        r"Neither loss depends on hparams\['decay'\]\. .*the same tensors.*detach",
    ),
    in_a_term_without_params=Case(
        lambda net, h: (losses(net, h.detach())[0] + h.exp(), net(X).mean(), net.parameters(), h),
        ValueError,
        r"Neither loss depends on hparams.*A term of inner_loss without params",
    ),
    learning_rate=Case(
        lambda net, h: usual(net, h, hparams=torch.tensor(0.1, requires_grad=True)),
        ValueError,
        r"learning rate or weight_decay is in no loss: .*bl\.FixedPoint and bl\.Unrolled",
    ),
    no_gradient=Case(
        lambda net, h: usual(net, h, hparams={"decay": torch.tensor(-1.0)}),
        ValueError,
        r"hparams\['decay'\] does not require a gradient.*requires_grad_\(\)",
    ),
    number=Case(
        lambda net, h: usual(net, h, hparams=-1.0),
        TypeError,
        r"^hparams: expected a tensor, or a list.*got float\. Write torch\.tensor\(-1\.0, requires_grad=True\)",
    ),
    number_in_a_dict=Case(
        lambda net, h: usual(net, h, hparams={"decay": h, "lr": 0.1}),
        TypeError,
        r"hparams\['lr'\]: expected an array of torch, got float",
    ),
    another_device=Case(
        lambda net, h: usual(
            net, h, params=net.named_parameters(), hparams={"w": torch.ones(3, device="meta", requires_grad=True)}
        ),
        ValueError,
        r"hparams\['w'\] is on meta, but params\['0\.bias'\] is on cpu",
    ),
    computed_from_another=Case(
        inner_with(lambda raw: (x := raw * 1, [raw, x])),
        ValueError,
        r"hparams\[1\] is computed from hparams\[0\].*counts twice",
    ),
    computed_again=Case(
        inner_with(lambda raw: (raw.exp(), {"a": raw.exp()})),
        ValueError,
        r"hparams\['a'\] is computed from other tensors, but no loss is",
    ),
    computed_and_hooked=Case(
        inner_with(lambda raw: (x := hooked(raw * 1), x)),
        ValueError,
        r"hparams has a gradient hook.*Register the hook on the other tensors",
    ),
)
def test_hparams(case):
    check(case)


@cases(
    adjoint_of_other_params=Case(
        lambda net, h: usual(net, h, params=net.named_parameters()),
        ValueError,
        r"adjoint0\['0\.bias'\]: expected the structure of params",
        {"adjoint0": {"w": torch.ones(1)}},
    ),
    backend_by_name=Case(
        usual, TypeError, r"^backend: expected a TorchBackend, .* got 'torch'\. Leave it out", {"backend": "torch"}
    ),
    unrolled=Case(usual, TypeError, r"Unrolled runs inner steps .* use bl\.hypergradient", {"solver": "unrolled"}),
    grad_scaler=Case(
        usual, ValueError, r"loss_scale: .* Pass scaler\.get_scale\(\)", {"loss_scale": torch.amp.GradScaler("cpu")}
    ),
    array_as_hparams=Case(
        lambda net, h: (*losses(net, h), net.parameters(), np.zeros(2)),
        TypeError,
        "hparams: expected a tensor, got ndarray",
    ),
    **{
        f"loss_scale_{scale}": Case(
            usual, ValueError, "loss_scale: expected a finite number > 0", {"loss_scale": scale}
        )
        for scale in (0, float("inf"), "a")
    },
)
def test_options(case):
    check(case)


def test_inference_mode_around_the_call():
    net, decay = small_net(), new_decay()
    both = losses(net, decay)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=INFERENCE):
        call(*both, net.parameters(), decay)


def test_a_module_that_runs_itself_with_a_penalty_on_copies():
    """The penalty still makes the loss depend on params."""
    net, decay = small_net(), new_decay()
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def inner(params, decay):
        return (net(X) - 1).pow(2).mean() + decay.exp() * sum((p**2).sum() for p in params.values())

    problem = bl.Problem(inner, lambda params, decay: params["0.weight"].sum())
    with pytest.raises(ValueError, match=r"inner was computed with another tensor than params\['.*functional_call"):
        bl.hypergradient(problem, weights, decay.detach(), solver=bl.CG(damping=10.0))


def test_a_warning_points_at_the_users_line():
    net, decay = small_net(), new_decay()
    with pytest.warns(bl.SolverWarning) as caught:
        bilevel_torch.backward(*losses(net, decay), net.parameters(), decay, solver=bl.CG(maxiter=1))
    assert caught[0].filename == __file__
