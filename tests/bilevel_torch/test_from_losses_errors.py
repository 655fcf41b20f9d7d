"""What a PyTorch user meets who makes a mistake in the loop: each error names the culprit and the way out."""

import pytest

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
nn = torch.nn


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.fixture
def decay():
    return torch.tensor(-1.0, requires_grad=True)


X = torch.ones(5, 3)


def losses(net, decay, of=None):
    penalty = decay.exp() * sum((p**2).sum() for p in (of or net).parameters())
    return (net(X) - 1).pow(2).mean() + penalty, net(X).pow(2).mean()


class Bent(nn.Module):
    """A module of one's own, which torch.compile takes whole; those of PyTorch it may run as they are."""

    def __init__(self, bend=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.bend = nn.Linear(3, 4), nn.Linear(4, 1), bend

    def forward(self, x):
        return self.second(self.bend(self.first(x)))


def call(inner, outer, params, hparams, **options):
    return bilevel_torch.backward(inner, outer, params, hparams, solver=bl.CG(damping=10.0, rtol=1e-4), **options)


def test_hparams_without_influence_are_named(net, decay):
    with pytest.raises(ValueError, match=r"Neither loss depends on hparams\['decay'\]\. .*the same tensors.*detach"):
        call(*losses(net, decay.detach()), net.parameters(), {"decay": decay})


def test_hparams_in_a_term_without_params_have_no_influence(net, decay):
    inner, outer = losses(net, decay.detach())
    with pytest.raises(ValueError, match=r"Neither loss depends on hparams.*A term of inner_loss without params"):
        call(inner + decay.exp(), outer, net.parameters(), decay)


def test_one_of_several_without_influence_is_zero(net, decay):
    idle = torch.ones(2, requires_grad=True)
    with pytest.warns(bl.DependenceWarning, match=r"Neither outer_loss nor .* inner_loss .* depends on hparams\[1\]"):
        hg = call(*losses(net, decay), net.parameters(), [decay, idle])
    assert hg.grad[0] != 0
    assert not hg.grad[1].any()


def test_hparams_that_require_no_gradient_are_named(net):
    with pytest.raises(ValueError, match=r"hparams\['decay'\] does not require a gradient.*requires_grad_\(\)"):
        call(*losses(net, torch.tensor(-1.0)), net.parameters(), {"decay": torch.tensor(-1.0)})


def test_params_of_another_module_are_named(net, decay):
    other = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"outer_loss depends on neither params\['weight'\].* nor .*Do not detach"):
        call(*losses(net, decay), {"weight": other.weight}, decay)


def test_copies_of_the_params_are_named(net, decay):
    copies = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    inner, outer = losses(net, decay)
    with pytest.raises(ValueError, match=r"inner_loss does not depend on params\['0\.bias'\].*pass the module's own"):
        call(inner, outer + decay, copies, decay)


def test_params_that_are_all_frozen(net, decay):
    inner, outer = losses(net, decay)
    net.requires_grad_(False)  # as Lightning's toggle_optimizer does
    with pytest.raises(ValueError, match=r"params\['0\.bias'\].*all frozen"):
        call(inner, outer, net.named_parameters(), decay)


def test_params_of_a_state_dict(net, decay):
    with pytest.raises(ValueError, match=r"params\['0\.bias'\].*all frozen.*not its state_dict\(\)"):
        call(*losses(net, decay), net.state_dict(), decay)


def test_a_step_before_the_hypergradient(net, decay):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    inner, outer = losses(net, decay)
    inner.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"(?s)modified by an inplace operation.*Take\s+the step before both losses"):
        call(inner, outer, net.parameters(), decay)


def test_a_graph_already_freed(net, decay):
    inner, outer = losses(net, decay)
    inner.backward()
    with pytest.raises(RuntimeError, match=r"(?s)second time.*Compute the hypergradient first.*retain_graph=True"):
        call(inner, outer, net.parameters(), decay)


@pytest.mark.parametrize("role", [0, 1])
def test_a_loss_without_a_graph(net, decay, role):
    both = list(losses(net, decay))
    both[role] = both[role].detach()
    with pytest.raises(ValueError, match=f"{['inner_loss', 'outer_loss'][role]} has no graph.*no_grad"):
        call(*both, net.parameters(), decay)


def test_a_loss_turned_into_a_number(net, decay):
    inner, outer = losses(net, decay)
    with pytest.raises(TypeError, match=r"outer_loss: expected a scalar tensor, got float: do not call \.item\(\)"):
        call(inner, outer.item(), net.parameters(), decay)


def test_a_loss_with_something_beside_it(net, decay):
    inner, outer = losses(net, decay)
    with pytest.raises(TypeError, match=r"outer_loss: expected a scalar tensor, got tuple\.$"):
        call(inner, (outer, {}), net.parameters(), decay)


def test_a_learning_rate_is_in_no_loss(net, decay):
    inner, outer = losses(net, decay.detach())
    lr = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"learning rate or weight_decay is in no loss: .*bl\.FixedPoint and bl\.Unrolled"
    ):
        call(inner, outer, net.parameters(), lr)


def test_a_loss_per_example(net, decay):
    inner, _ = losses(net, decay)
    with pytest.raises(ValueError, match=r"outer_loss: expected a scalar, got an array of shape \(5, 1\)"):
        call(inner, net(X), net.parameters(), decay)


def test_inference_mode_around_the_losses(net, decay):
    with torch.inference_mode():
        both = losses(net, decay)
    with pytest.raises(RuntimeError, match=r"inference_mode.*would be zero without an error"):
        call(*both, net.parameters(), decay)


def test_inference_mode_around_the_call(net, decay):
    both = losses(net, decay)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*would be zero without an error"):
        call(*both, net.parameters(), decay)


class TestCheckpoints:
    def test_a_reentrant_checkpoint_hides_its_parameters(self, net, decay):
        x = X.clone().requires_grad_()
        z = torch.utils.checkpoint.checkpoint(net[:2], x, use_reentrant=True)
        inner = (net[2](z) - 1).pow(2).mean() + decay.exp() * sum((p**2).sum() for p in net[2].parameters())
        with pytest.raises(RuntimeError, match=r"inner_loss hides .*zero without an error.*use_reentrant=False"):
            call(inner, net(X).pow(2).mean(), net.parameters(), decay)
        with pytest.raises(RuntimeError, match=r"outer_loss hides .*zero without an error.*use_reentrant=False"):
            call(losses(net, decay)[0], net[2](z).pow(2).mean(), net.parameters(), decay)

    def test_it_hides_them_though_a_penalty_reaches_all(self, net, decay):
        z = torch.utils.checkpoint.checkpoint(net[:2], X.clone().requires_grad_(), use_reentrant=True)
        inner = net[2](z).pow(2).mean() + decay.exp() * sum((p**2).sum() for p in net.parameters())
        with pytest.raises(RuntimeError, match=r"inner_loss hides parameters"):
            call(inner, net(X).pow(2).mean(), net.parameters(), decay)


class TestOperationsWithoutASecondDerivative:
    def test_attention_names_the_kernel_that_has_one(self, net, decay):
        x, attend = torch.randn(2, 5, 4), nn.MultiheadAttention(4, 2, batch_first=True)

        def inner():
            out = attend(x, x, x, need_weights=False)[0]
            return (out - 1).pow(2).mean() + decay.exp() * sum((p**2).sum() for p in attend.parameters())

        outer = attend(x, x, x)[0].mean()
        with pytest.raises(RuntimeError, match=r"(?s)flash_attention.*sdpa_kernel\(SDPBackend\.MATH\)"):
            call(inner(), outer, attend.parameters(), decay)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert call(inner(), outer, attend.parameters(), decay).grad != 0

    def test_an_operator_of_ones_own(self, net, decay):
        def operator(name, function, schema):
            return torch.library.custom_op(f"bilevel_test::{name}", function, mutates_args=(), schema=schema)

        slope = operator("slope", lambda x, g: 2 * x * g, "(Tensor x, Tensor g) -> Tensor")
        square = operator("square", torch.square, "(Tensor x) -> Tensor")
        square.register_autograd(
            lambda ctx, g: slope(ctx.saved_tensors[0], g),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
        )
        with pytest.raises(RuntimeError, match=r"(?s)no autograd formula.*differentiates twice.*finite-differences"):
            call(square(net(X)).mean() + losses(net, decay)[0], net(X).mean(), net.parameters(), decay)


class TestCompiled:
    """With a backend that needs no compiler; what is refused is the same."""

    @pytest.fixture
    def compiled(self, net):
        torch._dynamo.reset()  # what other tests have compiled would change the error
        return torch.compile(net, backend="aot_eager")

    def test_a_compiled_module_names_the_eager_one(self, net, compiled, decay):
        inner, outer = losses(compiled, decay)
        with pytest.raises(RuntimeError, match=r"(?s)double backward.*_orig_mod.*finite-differences"):
            call(inner, outer, net.parameters(), decay)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_the_same_after_a_training_step_and_force_eager_does(self, in_place, decay):
        """A step leaves its graph with buffers to reuse, about which PyTorch has another error."""
        torch._dynamo.reset()
        net = Bent()
        if in_place:
            net.compile(backend="aot_eager")
        module = net if in_place else torch.compile(net, backend="aot_eager")
        losses(module, decay)[0].backward()
        with pytest.raises(RuntimeError, match=r"(?s)create_graph=False.*set_stance\('force_eager'\)"):
            call(*losses(module, decay), net.parameters(), decay)
        with torch.compiler.set_stance("force_eager"):
            found = call(*losses(module, decay), net.parameters(), decay)
        assert torch.equal(found.grad, call(*losses(net.forward, decay, net), net.parameters(), decay).grad)

    def test_the_eager_module_does(self, net, compiled, decay):
        hg = call(*losses(compiled._orig_mod, decay), net.parameters(), decay)
        assert torch.equal(hg.grad, call(*losses(net, decay), net.parameters(), decay).grad)

    def test_finite_differences_do(self, net, compiled, decay):
        def inner(params, decay):
            out = torch.func.functional_call(compiled, {f"_orig_mod.{n}": p for n, p in params.items()}, (X,))
            return (out - 1).pow(2).mean() + decay.exp() * sum((p**2).sum() for p in params.values())

        def outer(params, decay):
            return torch.func.functional_call(net, params, (X,)).pow(2).mean()

        problem = bl.Problem(inner, outer, curvature="finite-differences")
        hg = bl.hypergradient(problem, dict(net.named_parameters()), decay, solver=bl.CG(damping=10.0, rtol=1e-2))
        expected = call(*losses(net, decay), net.parameters(), decay)
        assert float(hg.grad) == pytest.approx(float(expected.grad), rel=0.02)


def function(backward, forward=lambda x, *_: x.tanh(), once=False):
    """An autograd.Function of a tensor and whatever else it is handed."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(args[0])
            ctx.set_materialize_grads(False)
            return forward(*args)

    def pull(ctx, *grads):
        return backward(ctx.saved_tensors[0], *grads)

    Custom.backward = staticmethod(torch.autograd.function.once_differentiable(pull) if once else pull)
    return Custom.apply


def slope(x, g):
    return g * (1 - x.tanh() ** 2)


class TestSecondDerivativesThatAreLost:
    """Beside a penalty, which has a second derivative, they would count as zero."""

    @pytest.fixture(
        params=[function(slope, once=True), function(lambda x, g: torch.from_numpy(slope(x, g).detach().numpy()))],
        ids=["once differentiable", "in NumPy"],
    )
    def hiding(self, request):
        return request.param

    MESSAGE = r"backward\(\) of Custom has no derivative.*without an error.*saved_tensors.*finite-differences"

    def test_by_an_autograd_function(self, hiding, decay):
        net = Bent(hiding)
        with pytest.raises(RuntimeError, match=self.MESSAGE):
            call(*losses(net, decay), net.parameters(), decay)
        assert decay.grad is None

    def test_in_a_problem_too_where_finite_differences_do(self, hiding, decay):
        net, eager = Bent(hiding), Bent()

        def problem(net, **options):
            def outputs(params):
                return torch.func.functional_call(net, params, (X,))

            def inner(params, h):
                return (outputs(params) - 1).pow(2).mean() + h.exp() * sum((p**2).sum() for p in params.values())

            return bl.Problem(inner, lambda params, h: outputs(params).pow(2).mean(), **options)

        point, solver = (dict(net.named_parameters()), decay), bl.CG(damping=10.0, rtol=1e-2)
        with pytest.raises(RuntimeError, match=self.MESSAGE):
            bl.hypergradient(problem(net), *point, solver=solver)
        found = bl.hypergradient(problem(net, curvature="finite-differences"), *point, solver=solver)
        expected = bl.hypergradient(problem(eager), *point, solver=solver)
        assert float(found.grad) == pytest.approx(float(expected.grad), rel=0.02)

    def test_of_a_loss_that_ends_in_one_that_says_so(self, decay):
        square = function(lambda x, g: 2 * x * g, lambda x: x**2, once=True)
        net = Bent()
        inner = square(net(X)).mean() + losses(net, decay)[0]
        with pytest.raises(RuntimeError, match=self.MESSAGE):
            call(inner, net(X).mean(), net.parameters(), decay)

    def test_by_weight_norm(self, decay):
        net = Bent()
        nn.utils.parametrizations.weight_norm(net.first)
        state = torch.get_rng_state()
        with pytest.raises(RuntimeError, match=r"weight_norm is wrong in this.*v / v\.norm.*finite-differences"):
            call(*losses(net, decay), net.parameters(), decay)
        assert torch.equal(torch.get_rng_state(), state)

    def test_where_no_product_passes_they_do_no_harm(self, hiding, decay):
        """Upstream of hparams alone, and in the outer loss."""
        net, augment = Bent(), nn.Linear(3, 3)
        nn.utils.parametrizations.weight_norm(augment)

        def both(bend):
            out = net(X + bend(augment(X)))
            return 0.1 * (out - 1).pow(2).mean() + losses(net, decay)[0], bend(net(X)).pow(2).mean()

        hparams = [decay, *augment.parameters()]
        found, expected = (call(*both(bend), net.parameters(), hparams).grad for bend in (hiding, torch.tanh))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(
        ("bend", "same_as"),
        [
            (function(slope), torch.tanh),
            (function(lambda x, g: g, torch.round), lambda x: x + (x.round() - x).detach()),
            (function(lambda x, g: torch.zeros_like(x), torch.round), torch.round),
            (function(lambda x, g: -g, torch.clone), lambda x: 2 * x.detach() - x),
        ],
        ids=["differentiable", "straight through", "no gradient", "reversed gradient"],
    )
    def test_other_functions_are_not_refused(self, bend, same_as, decay):
        found, expected = (
            call(*losses(net, decay), net.parameters(), decay).grad for net in (Bent(bend), Bent(same_as))
        )
        torch.testing.assert_close(found, expected)

    def test_a_function_that_passes_one_loss_on_beside_what_others_are_made_of(self, net, decay):
        """As DistributedDataParallel's does: the gradient of the former is a constant, and rightly so."""
        passing = function(lambda _, *g: (*g, None), lambda *args: tuple(a.clone() for a in args[:2]))

        def inner(pass_on):
            out, own = pass_on(net(X), net[0].weight.pow(2).sum(), "other arguments")[:2]
            return (out - 1).pow(2).mean() + own + decay.exp() * net[2].weight.pow(2).sum()

        found, expected = (
            call(inner(p), net(X).mean(), net.parameters(), decay).grad for p in (passing, lambda *args: args)
        )
        torch.testing.assert_close(found, expected)


def test_devices_that_differ_are_named(net, decay):
    weights = torch.ones(3, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match=r"hparams\['weights'\] is on meta, but params\['0\.bias'\] is on cpu"):
        call(*losses(net, decay), net.named_parameters(), {"weights": weights})


class TestTrees:
    def test_a_module_in_place_of_its_parameters(self, net, decay):
        with pytest.raises(TypeError, match=r"params is a module. Pass its parameters\(\)"):
            call(*losses(net, decay), net, decay)

    def test_modules_in_place_of_their_parameters(self, net, decay):
        with pytest.raises(TypeError, match=r"params\[0\]: expected an array of torch, got Linear"):
            call(*losses(net, decay), list(net), decay)

    def test_a_number_among_the_hparams(self, net, decay):
        with pytest.raises(TypeError, match=r"hparams: expected a tensor, or a list.*got float"):
            call(*losses(net, decay), net.parameters(), -1.0)
        with pytest.raises(TypeError, match=r"hparams\['lr'\]: expected an array of torch, got float"):
            call(*losses(net, decay), net.parameters(), {"decay": decay, "lr": 0.1})

    def test_integers_among_the_params(self, net, decay):
        steps = torch.zeros((), dtype=torch.int64)
        with pytest.raises(TypeError, match=r"params\['steps'\]: expected a floating-point leaf, got torch\.int64"):
            call(*losses(net, decay), {**dict(net.named_parameters()), "steps": steps}, decay)

    def test_no_params_at_all(self, net, decay):
        with pytest.raises(ValueError, match="params has no leaves"):
            call(*losses(net, decay), [], decay)
        used_up = net.parameters()
        list(used_up)
        with pytest.raises(ValueError, match=r"params: the iterator is empty. .* serves only one call"):
            call(*losses(net, decay), used_up, decay)

    def test_a_tensor_that_is_there_twice(self, net, decay):
        with pytest.raises(ValueError, match=r"params\[1\] is the same tensor as params\[0\]"):
            call(*losses(net, decay), [net[0].weight, net[0].weight], decay)

    def test_lists_dicts_and_iterables_are_one_and_the_same(self, net):
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


class TestComputedHyperparameters:
    def test_one_made_of_another_would_count_twice(self, net):
        raw = torch.tensor(-1.0, requires_grad=True)
        decay = raw * 1
        with pytest.raises(ValueError, match=r"hparams\[1\] is computed from hparams\[0\].*counts twice"):
            call(*losses(net, decay), net.parameters(), [raw, decay])

    def test_two_parts_of_one_operation_are_not_made_of_each_other(self, net):
        a, b = torch.tensor([-1.0, 0.5], requires_grad=True).unbind()
        inner, outer = losses(net, a)
        call(inner + b * net[0].weight.pow(2).sum(), outer, net.parameters(), [a, b])

    def test_one_made_anew_in_the_call_is_known_to_no_loss(self, net, decay):
        raw = torch.tensor(-1.0, requires_grad=True)
        inner, outer = losses(net, decay)
        with pytest.raises(ValueError, match=r"hparams\['b'\] is computed from other tensors, but no loss is"):
            call(inner + raw.exp() * net[0].weight.pow(2).sum(), outer, net.parameters(), {"a": decay, "b": raw.exp()})

    def test_a_hook_on_one_would_act_on_every_product(self, net):
        decay = torch.tensor(-1.0, requires_grad=True) * 1
        decay.register_hook(lambda g: 2 * g)
        with pytest.raises(ValueError, match=r"hparams has a gradient hook.*Register the hook on the other tensors"):
            call(*losses(net, decay), net.parameters(), decay)


def test_sparse_gradients(decay):
    embed = nn.Embedding(3, 2, sparse=True)
    loss = embed(torch.tensor([0, 1])).pow(2).sum() * decay.exp()
    with pytest.raises(TypeError, match=r"a gradient of shape \(3, 2\) is sparse.*sparse=True"):
        call(loss, embed(torch.tensor([2])).sum(), embed.parameters(), decay)


def test_a_scale_of_the_loss_is_a_number_above_zero(net, decay):
    for scale in (0, float("inf"), "a"):
        with pytest.raises(ValueError, match="loss_scale: expected a finite number > 0, got"):
            call(*losses(net, decay), net.parameters(), decay, loss_scale=scale)


def test_a_module_that_runs_itself_beside_a_penalty_on_copies(net, decay):
    """The loss depends on params all the same, by its penalty."""
    copies = {name: p.detach() for name, p in net.named_parameters()}

    def inner(params, decay):
        return (net(X) - 1).pow(2).mean() + decay.exp() * sum((p**2).sum() for p in params.values())

    problem = bl.Problem(inner, lambda params, decay: params["0.weight"].sum())
    with pytest.raises(ValueError, match=r"inner was computed with another tensor than params\['.*functional_call"):
        bl.hypergradient(problem, copies, decay.detach(), solver=bl.CG(damping=10.0))


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


def test_an_adjoint_of_other_params(net, decay):
    with pytest.raises(ValueError, match=r"adjoint0\['0\.bias'\]: expected the structure of params"):
        call(*losses(net, decay), net.named_parameters(), decay, adjoint0={"w": torch.ones(1)})


def test_unrolled_needs_the_losses_as_functions(net, decay):
    with pytest.raises(TypeError, match=r"Unrolled runs inner steps .* use bl\.hypergradient"):
        bilevel_torch.backward(*losses(net, decay), net.parameters(), decay, solver="unrolled")


def test_a_warning_points_at_the_users_line(net, decay):
    with pytest.warns(bl.SolverWarning) as caught:
        bilevel_torch.backward(*losses(net, decay), net.parameters(), decay, solver=bl.CG(maxiter=1))
    assert caught[0].filename == __file__
