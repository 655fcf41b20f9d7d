"""Second derivatives that an operation does not have, or that would be lost without an error: PyTorch loops."""

import pytest

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")

from torch_losses import Bent, X, call, losses  # noqa: E402

nn, F = torch.nn, torch.nn.functional


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


INDEX = torch.tensor([[0, 1], [2, 2], [1, 4]])
OTHERS = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]])


def attention(layer, x):
    return layer(x, x, x, need_weights=False)[0]


def with_kernel(layer, x):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return attention(layer, x)


def operator(name, function, schema):
    return torch.library.custom_op(f"bilevel_test::{name}", function, mutates_args=(), schema=schema)


SLOPE = operator("slope", lambda x, g: 2 * x * g, "(Tensor x, Tensor g) -> Tensor")
SQUARE = operator("square", torch.square, "(Tensor x) -> Tensor")
SQUARE.register_autograd(
    lambda ctx, g: SLOPE(ctx.saved_tensors[0], g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)

WITHOUT = {
    # name: (layer, its output, the output by the way out, the way out in words)
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda layer: attention(layer, torch.arange(40.0).reshape(2, 5, 4).sin()),
        lambda layer: with_kernel(layer, torch.arange(40.0).reshape(2, 5, 4).sin()),
        r'Compute the losses within torch\.nn\.attention\.sdpa_kernel\(SDPBackend\.MATH\)\..*implementation="eager"',
    ),
    "cdist": (
        lambda: nn.Linear(3, 3),
        lambda layer: torch.cdist(layer(X), OTHERS),
        lambda layer: torch.cdist(layer(X), OTHERS, compute_mode="use_mm_for_euclid_dist"),
        r'Pass compute_mode="use_mm_for_euclid_dist" to torch\.cdist\.',
    ),
    "embedding bag": (
        lambda: nn.EmbeddingBag(6, 3),
        lambda layer: layer(INDEX),
        lambda layer: F.embedding(INDEX, layer.weight).mean(1),
        r"Use torch\.nn\.Embedding.*embedding\(i\)\.mean\(1\)\.",
    ),
    "segments": (
        lambda: nn.Linear(3, 3),
        lambda layer: torch.segment_reduce(layer(X), "sum", lengths=torch.tensor([2, 3]), axis=0),
        lambda layer: torch.zeros(2, 3).index_add(0, torch.tensor([0, 0, 1, 1, 1]), layer(X)),
        r"Sum by an index: .*scatter_reduce, or in PyTorch Geometric index= in place of ptr=\.",
    ),
    "CTC": (
        lambda: nn.Linear(3, 4),
        lambda layer: F.ctc_loss(
            layer(torch.ones(6, 1, 3)).log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([6]), torch.tensor([2])
        ),
        None,
        "Write it with other operations, or differentiate once",
    ),
    "gamma samples": (
        lambda: nn.Linear(3, 1),
        lambda layer: torch.distributions.Gamma(layer(X).exp(), torch.ones(())).rsample(),
        None,
        "Write it with other operations, or differentiate once",
    ),
    "an operator of a library": (
        lambda: nn.Linear(3, 1),
        lambda layer: SQUARE(layer(X)),
        lambda layer: layer(X) ** 2,
        "Write it with other operations, or differentiate once",
    ),
}


class TestOperationsWithoutASecondDerivative:
    @pytest.mark.parametrize("name", WITHOUT)
    def test_the_error_has_the_way_out_that_fits(self, name, decay):
        torch.manual_seed(0)
        make, output, way_out, text = WITHOUT[name]
        layer = make()

        def both(output):
            return output(layer).pow(2).mean() + losses(lambda x: x.mean(), decay, layer)[0], output(layer).mean()

        with pytest.raises(
            RuntimeError, match=rf"(?s)^A Hessian-vector product differentiates twice.*{text}"
        ) as caught:
            call(*both(output), layer.parameters(), decay)
        assert str(caught.value).count("finite-differences") == 1
        for other in ("sdpa_kernel", "cudnn", "force_eager", "compute_mode", "embedding(i)", "ptr="):
            fits = other in text.replace("\\", "")
            assert (other in str(caught.value)) == fits, other
        assert decay.grad is None
        if way_out is not None:
            torch.testing.assert_close(way_out(layer), output(layer))
            call(*both(way_out), layer.parameters(), decay)
            assert decay.grad != 0

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_recurrent_layers_of_cudnn(self):
        layer = nn.LSTM(3, 2).cuda()
        decay = torch.tensor(-1.0, device="cuda", requires_grad=True)

        def both():
            out = layer(X.cuda())[0]
            return out.pow(2).mean() + decay.exp() * sum((p**2).sum() for p in layer.parameters()), out.mean()

        with pytest.raises(
            RuntimeError, match=r"Compute the losses within torch\.backends\.cudnn\.flags\(enabled=False"
        ):
            call(*both(), layer.parameters(), decay)
        with torch.backends.cudnn.flags(enabled=False):
            losses = both()
        call(*losses, layer.parameters(), decay)
        assert decay.grad != 0

    def test_an_error_of_a_hook_gets_a_note(self, net, decay):
        stack = [1]

        def pops(module, grad_input, grad_output):
            stack.pop()

        net[2].register_full_backward_hook(pops)
        with pytest.raises(IndexError, match="pop from empty list") as caught:
            call(*losses(net, decay), net.parameters(), decay)
        assert "runs backward hooks several times" in caught.value.__notes__[0]
        assert "GradSampleModule of opacus" in caught.value.__notes__[0]


class TestCompiled:
    """With a backend that needs no compiler; what is refused is the same."""

    @pytest.fixture
    def compiled(self, net):
        torch._dynamo.reset()  # what other tests have compiled would change the error
        return torch.compile(net, backend="aot_eager")

    def test_a_compiled_module_names_the_eager_one(self, net, compiled, decay):
        inner, outer = losses(compiled, decay)
        with pytest.raises(RuntimeError, match=r"^A Hessian-vector product.*_orig_mod.*finite-differences"):
            call(inner, outer, net.parameters(), decay)

    def test_a_loss_of_a_linear_layer(self, decay):
        """PyTorch has no error for it: the second derivative lacks what the compiled function has computed inside."""
        torch._dynamo.reset()
        x, y = torch.eye(3), torch.tensor([0, 1, 1])

        def loss(w):
            return F.cross_entropy(x @ w, y)

        compiled = torch.compile(loss, backend="aot_eager")
        w = torch.ones(3, 2, requires_grad=True)
        (grad,) = torch.autograd.grad(compiled(w) + w.pow(2).sum(), w, create_graph=True)
        (product,) = torch.autograd.grad(grad, w, torch.ones_like(w))
        assert torch.equal(product, torch.full_like(w, 2.0))  # only the second derivative of the penalty

        def inner(w, decay):
            return compiled(w) + decay.exp() * w.pow(2).sum()

        def step(w, decay, batch=None):
            (g,) = torch.autograd.grad(inner(w, decay), w, create_graph=bilevel_torch.recording())
            return w - 0.1 * g

        def graph_step(w, decay):
            return w - 0.1 * torch.autograd.grad(inner(w, decay), w, create_graph=True)[0]

        def outer(w, decay):
            return loss(w)

        def slope(w, decay):
            return torch.autograd.grad(compiled(w), w, create_graph=True)[0].pow(2).sum()

        solve = bilevel_torch.implicit_minimizer(inner)(lambda decay: torch.ones(3, 2))
        problem, hparams = bl.Problem(inner, outer), decay.detach()
        twice = r"^A Hessian-vector product differentiates twice, and a compiled module differentiates only once\."
        contains = r"contains the gradient of a compiled function\. A Hessian-vector product .*force_eager"
        for compute, text in {
            lambda: call(inner(w, decay), loss(w), w, decay): twice,
            lambda: bl.hypergradient(problem, w, hparams): twice,
            lambda: bl.hypergradient(problem, w, hparams, solver=bl.Unrolled(steps=2, step_size=0.1)): twice,
            lambda: bl.diagnose(problem, w, hparams): twice,
            lambda: solve(decay).sum().backward(): twice,
            lambda: bl.hypergradient(bl.FixedPoint(graph_step, outer), w, hparams, solver="gmres"): f"^step {contains}",
            lambda: bl.hypergradient(bl.Problem(outer, slope), w, hparams): f"^outer {contains}",
            lambda: bl.metagradient(bl.Training(step, outer), w.detach(), hparams, [None]): f"^step {contains}",
        }.items():
            with pytest.raises(RuntimeError, match=text):
                compute()
        assert decay.grad is None
        with torch.compiler.set_stance("force_eager"):
            found = call(inner(w, decay), loss(w), w, decay).grad
        assert found == call(loss(w) + decay.exp() * w.pow(2).sum(), loss(w), w, decay).grad

    @pytest.mark.parametrize("in_place", [False, True])
    def test_the_same_after_a_training_step_and_force_eager_does(self, in_place, decay):
        """A step leaves its graph with buffers to reuse, about which PyTorch has another error."""
        torch._dynamo.reset()
        net = Bent()
        if in_place:
            net.compile(backend="aot_eager")
        module = net if in_place else torch.compile(net, backend="aot_eager")
        losses(module, decay)[0].backward()
        with pytest.raises(
            RuntimeError, match=r"(?s)^A Hessian-vector.*set_stance\('force_eager'\).*create_graph=False"
        ):
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
