"""Compiled Hessian-vector products. Most tests capture the products, and do not compile them to machine code."""

import pytest

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
check_equal = pytest.importorskip("bilevel_torch.compiled.backend").check_equal
functional_call, cross_entropy = torch.func.functional_call, torch.nn.functional.cross_entropy

SIZES = (8, 6, 3)


def net():
    a, b, c = SIZES
    return torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.Tanh(), torch.nn.Linear(b, c))


NET = net()


def loss(w, x, y):
    return cross_entropy(functional_call(NET, w, (x,)), y)


def inner(w, h, x, y):
    return loss(w, x, y) + sum((h[k].exp() * w[k].square()).sum() for k in w)


def outer(w, h, x, y):
    return loss(w, x, y)


def arguments(dtype=torch.float64, examples=20, seed=0):
    torch.manual_seed(seed)
    w = {k: torch.randn_like(p, dtype=dtype) / 3 for k, p in NET.named_parameters()}
    h = {k: torch.zeros_like(p) for k, p in w.items()}
    batches = [(torch.randn(examples, SIZES[0], dtype=dtype), torch.randint(SIZES[-1], (examples,))) for _ in range(2)]
    return {"params": w, "hparams": h, "inner_args": batches[0], "outer_args": batches[1]}


def both(problem, arguments, backend, **options):
    """The hypergradients of a compiled and of an ordinary backend, with the same random numbers."""
    results = []
    for spec in (backend, None):
        torch.manual_seed(1)
        results.append(bl.hypergradient(problem, **arguments, backend=spec, on_failure="ignore", **options))
    return results


def assert_same(problem, arguments, backend, tolerance=1e-12, **options):
    own, expected = both(problem, arguments, backend, **options)
    for of_own, of_expected in ((own.grad, expected.grad), (own.adjoint, expected.adjoint)):
        for name, t in of_expected.items():
            torch.testing.assert_close(of_own[name], t, rtol=tolerance, atol=tolerance)
    assert own.info.status == expected.info.status


PROBLEM = bl.Problem(inner, outer)


class TestHypergradient:
    @pytest.mark.parametrize("solver", ["cg", "neumann", "minres", bl.Unrolled(steps=5, step_size=0.1)])
    def test_it_equals_that_of_autograd(self, solver):
        assert_same(PROBLEM, arguments(), bilevel_torch.Compiled("eager"), solver=solver)

    def test_float32(self):
        assert_same(PROBLEM, arguments(torch.float32), bilevel_torch.Compiled("eager"), tolerance=1e-5)

    def test_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(PROBLEM, arguments(torch.float32), bilevel_torch.Compiled("eager"), tolerance=1e-2)

    def test_micro_batches(self):
        given = arguments()
        parts = [arguments(seed=seed)["inner_args"] for seed in (3, 4)]
        backend = bilevel_torch.Compiled("eager")
        assert_same(PROBLEM, given | {"inner_args": bl.MicroBatches(parts)}, backend, solver="cg")

    def test_many_outer_objectives(self):
        given = arguments()

        def each(w, h, x, y):
            return cross_entropy(functional_call(NET, w, (x,)), y, reduction="none")[:3]

        problem, backend = bl.Problem(inner, each), bilevel_torch.Compiled("eager")
        own, expected = (
            bl.hypergradients(problem, **given, solver=bl.CG(rtol=1e-12), backend=spec) for spec in (backend, None)
        )
        for name, t in expected.grad.items():
            torch.testing.assert_close(own.grad[name], t, rtol=1e-9, atol=1e-12)

    def test_dropout_has_one_mask_for_all_products(self):
        def dropped(w, h, x, y):
            return inner(w, h, torch.nn.functional.dropout(x, 0.5), y)

        assert_same(bl.Problem(dropped, outer), arguments(), bilevel_torch.Compiled("eager"))

    def test_writing_to_own_tensors(self):
        def writing(w, h, x, y):
            x = 2.0 * x
            x[:, 0] = 0.0
            x += 1.0
            return inner(w, h, x, y)

        assert_same(bl.Problem(writing, outer), arguments(), bilevel_torch.Compiled("eager"))

    @pytest.mark.parametrize("solver", ["cg", bl.Neumann(terms=5, step_size=0.5), bl.Unrolled(steps=3, step_size=0.5)])
    def test_a_product_that_is_its_argument(self, solver):
        problem = bl.Problem(lambda w, h: (0.5 * w * w - w * h).sum(), lambda w, h: (w**3).sum())
        w, h = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
        hg = bl.hypergradient(problem, w, h, solver=solver, backend=bilevel_torch.Compiled("eager"))
        expected = bl.hypergradient(problem, w, h, solver=solver)
        torch.testing.assert_close(hg.grad, expected.grad, rtol=1e-14, atol=0.0)
        if solver == "cg":
            torch.testing.assert_close(hg.grad, 3 * w**2, rtol=1e-9, atol=0.0)

    def test_a_leaf_without_influence_is_noted(self):
        def partial(w, h, x, y):
            return loss(w, x, y) + sum(w[k].square().sum() for k in w) + (h["0.bias"] * w["0.bias"]).sum()

        with pytest.warns(bl.DependenceWarning):
            bl.hypergradient(bl.Problem(partial, outer), **arguments(), backend=bilevel_torch.Compiled("eager"))

    def test_without_influence(self):
        def constant(w, h, x, y):
            return loss(w, x, y) + sum(w[k].square().sum() for k in w)

        with pytest.raises(ValueError, match="hparams"):
            bl.hypergradient(bl.Problem(constant, outer), **arguments(), backend=bilevel_torch.Compiled("eager"))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # by PyTorch's own code
    def test_machine_code(self):
        assert_same(PROBLEM, arguments(torch.float32), bilevel_torch.Compiled(), tolerance=1e-5)


class Counting:
    """A compiler that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        self.calls += 1
        return graph


class TestPrograms:
    def test_moved_values_need_no_compilation(self):
        compiler = Counting()
        backend = bilevel_torch.Compiled(compiler)
        for seed in range(3):
            assert_same(PROBLEM, arguments(seed=seed), backend)
        assert compiler.calls == 1

    def test_other_shapes_and_modes_do(self):
        compiler = Counting()
        backend = bilevel_torch.Compiled(compiler)
        try:
            for i, (examples, train) in enumerate([(20, True), (10, True), (10, False), (20, True)]):
                NET.train(train)
                assert_same(PROBLEM, arguments(examples=examples), backend)
                assert compiler.calls == min(i + 1, 3)
        finally:
            NET.train()

    def test_too_many_are_an_error(self):
        backend = bilevel_torch.Compiled("eager")
        for examples in range(2, 10):
            bl.hypergradient(PROBLEM, **arguments(examples=examples), backend=backend)
        with pytest.raises(RuntimeError, match=r"8 programs are compiled.*drop_last=True"):
            bl.hypergradient(PROBLEM, **arguments(examples=10), backend=backend)


BATCH_NORM = torch.nn.BatchNorm1d(SIZES[0], dtype=torch.float64)
ELSEWHERE = torch.ones(20, SIZES[0], dtype=torch.float64)


class TestErrors:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (lambda x: x + ELSEWHERE, "a tensor that is no argument. Pass data in inner_args"),
            (lambda x: x if x.sum() > 0 else -x, "branches on the value of a tensor"),
            (lambda x: x.mul_(1.0), "changes one of its arguments"),
            (BATCH_NORM, "changes one of its arguments, such as the running statistics"),
        ],
    )
    def test_what_cannot_be_captured(self, changed, message):
        problem = bl.Problem(lambda w, h, x, y: inner(w, h, changed(x), y), outer)
        with pytest.raises(RuntimeError, match=message):
            bl.hypergradient(problem, **arguments(), backend=bilevel_torch.Compiled("eager"))

    def test_an_impure_objective(self):
        calls = []

        def impure(w, h, x, y):
            calls.append(1)
            return inner(w, h, x, y) * len(calls)

        with pytest.raises(RuntimeError, match=r"gradient differs from autograd's.*a pure function"):
            bl.hypergradient(bl.Problem(impure, outer), **arguments(), backend=bilevel_torch.Compiled("eager"))

    def test_what_counts_as_equal(self):
        right = [{"a": torch.ones(2), "b": torch.full((1,), 1e-9)}, torch.ones(1), None]
        rounding = [{"a": torch.ones(2) * (1 + 1e-6), "b": torch.full((1,), 3e-9)}, torch.ones(1), None]
        check_equal(right, rounding, [])
        wrong = [right[0], torch.full((1,), 1.001), None]
        with pytest.raises(RuntimeError, match=r"compiled Hessian-vector product differs from autograd's by 1\.0e-03"):
            check_equal(right, wrong, [])
        check_equal(right, wrong, [("cpu", torch.bfloat16)])

    def test_losses_in_place_of_functions(self):
        w, h, data, val = arguments().values()
        w, h = ({k: t.requires_grad_() for k, t in tree.items()} for tree in (w, h))
        backend = bilevel_torch.Compiled("eager")
        with pytest.raises(TypeError, match=r"Pass functions to bl\.hypergradient"):
            bilevel_torch.hypergradient(inner(w, h, *data), outer(w, h, *val), w, h, backend=backend)

    def test_an_argument_that_cannot_be_compared(self):
        given = arguments()
        given["inner_args"] = (*given["inner_args"], {1, 2})
        problem = bl.Problem(lambda w, h, x, y, s: inner(w, h, x, y), outer)
        with pytest.raises(TypeError, match="an argument of type set cannot be compared"):
            bl.hypergradient(problem, **given, backend=bilevel_torch.Compiled("eager"))
