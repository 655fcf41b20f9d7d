"""Forms of params and hparams that `bilevel_torch.backward` accepts."""

import pytest

import bilevel as bl

torch = pytest.importorskip("torch")
pytest.importorskip("bilevel_torch")

from torch_losses import X, call, losses  # noqa: E402

nn = torch.nn


def test_one_of_several_without_influence_is_zero(net, decay):
    idle = torch.ones(2, requires_grad=True)
    with pytest.warns(bl.DependenceWarning, match=r"Neither outer_loss nor .* inner_loss .* depends on hparams\[1\]"):
        hg = call(*losses(net, decay), net.parameters(), [decay, idle])
    assert hg.grad[0] != 0
    assert not hg.grad[1].any()


def test_lists_dicts_and_iterables_are_one_and_the_same(net):
    decays = nn.ParameterList(torch.full_like(p, -1.0) for p in net.parameters())

    def both():
        penalty = sum((d.exp() * p**2).sum() for d, p in zip(decays, net.parameters(), strict=True))
        return (net(X) - 1).pow(2).mean() + penalty, net(X).pow(2).mean()

    expected = call(*both(), list(net.parameters()), list(decays)).grad
    names = ["a", "b", "c", "d"]
    for params in (net.parameters, net.named_parameters, lambda: list(net.named_parameters())):
        for hparams in (decays, list(decays), nn.ParameterDict(dict(zip(names, decays, strict=True)))):
            hg = call(*both(), params(), hparams)
            found = [hg.grad[n] for n in names] if isinstance(hg.grad, dict) else hg.grad
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_two_parts_of_one_operation_are_not_made_of_each_other(net):
    a, b = torch.tensor([-1.0, 0.5], requires_grad=True).unbind()
    inner, outer = losses(net, a)
    call(inner + b * net[0].weight.pow(2).sum(), outer, net.parameters(), [a, b])


def test_views_of_one_flat_tensor_are_no_copies(decay):
    flat = torch.linspace(-1, 1, 6, requires_grad=True)
    w, b = flat[:4].view(2, 2), flat[4:]
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    inner, outer = (x @ w + b - 1).pow(2).mean() + decay.exp() * (w.pow(2).sum() + b.pow(2).sum()), (x @ w + b).sum()
    whole = call(inner, outer, flat, decay).grad
    torch.testing.assert_close(call(inner, outer, [w, b], decay).grad, whole)


def test_dicts_come_back_in_the_order_they_came_in(net, decay):
    params = dict(net.named_parameters())
    hg = call(*losses(net, decay), params, {"b": decay})
    assert list(hg.adjoint) == list(params) != sorted(params)
    for p, v in zip(params.values(), hg.adjoint.values(), strict=True):
        assert p.shape == v.shape


def test_a_dict_with_the_names_of_a_parameter_group(net):
    """Only numbers among the values show that it is one."""
    hparams = {"params": [torch.tensor(-1.0, requires_grad=True)], "lr": torch.tensor(0.5, requires_grad=True)}
    inner, outer = losses(net, hparams["params"][0])
    hg = call(inner * hparams["lr"], outer, net.parameters(), hparams)
    assert hg.grad["params"][0] != 0
