"""Hypergradients from two losses in half precision, under autocast, and with scaled losses."""

from contextlib import nullcontext

import pytest
from frameworks import relative_error

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
from torch_losses import flat  # noqa: E402

nn, F = torch.nn, torch.nn.functional


class TestPrecision:
    @pytest.fixture(autouse=True)
    def setup(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.x, self.x_val = torch.randn(2, 64, 8)
        self.y, self.y_val = torch.randint(3, (2, 64))
        self.decays = [torch.full_like(p, -3.0, requires_grad=True) for p in self.net.parameters()]

    def losses(self, cast=None, scale=1.0):
        with torch.autocast("cpu", dtype=cast) if cast else nullcontext():
            inner, outer = F.cross_entropy(self.net(self.x), self.y), F.cross_entropy(self.net(self.x_val), self.y_val)
        penalty = sum((d.exp() * p**2).sum() for d, p in zip(self.decays, self.net.parameters(), strict=True))
        return scale * (inner + penalty), scale * outer

    def hypergradient(self, losses, **options):
        options = {"solver": bl.CG(damping=0.5, rtol=1e-2), **options}
        return bilevel_torch.hypergradient(*losses, self.net.parameters(), self.decays, **options)

    def test_autocast_to_bfloat16_leaves_the_solve_in_float32(self):
        exact = self.hypergradient(self.losses())
        cast = self.hypergradient(self.losses(torch.bfloat16))
        assert cast.info.status is bl.Status.CONVERGED
        assert all(t.dtype == torch.float32 for t in [*cast.grad, *cast.adjoint])
        assert 1e-6 < relative_error(flat(cast.grad), flat(exact.grad)) <= 0.03

    @pytest.mark.parametrize("solver", [bl.GMRES(damping=0.5, rtol=1e-5), bl.Nystrom(rank=40, damping=4.0)])
    def test_autocast_around_the_call_is_for_the_losses_alone(self, solver):
        """A Krylov basis or a sketch in bfloat16 would not be orthogonal."""
        outside = self.hypergradient(self.losses(), solver=solver)
        losses = self.losses()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = self.hypergradient(losses, solver=solver)
        assert all(torch.equal(a, b) for a, b in zip(inside.grad, outside.grad, strict=True))

    def test_autocast_around_a_problem_casts_its_losses(self):
        names = [name for name, _ in self.net.named_parameters()]

        def call(w, x):
            return torch.func.functional_call(self.net, dict(zip(names, w, strict=True)), (x,))

        def inner(w, h, x, y):
            return F.cross_entropy(call(w, x), y) + sum((d.exp() * p**2).sum() for d, p in zip(h, w, strict=True))

        problem = bl.Problem(inner, lambda w, h, x, y: F.cross_entropy(call(w, x), y))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hg = bl.hypergradient(
                problem,
                list(self.net.parameters()),
                self.decays,
                inner_args=(self.x, self.y),
                outer_args=(self.x_val, self.y_val),
                solver=bl.GMRES(damping=0.5, rtol=1e-2),
            )
        cast = self.hypergradient(self.losses(torch.bfloat16), solver=bl.GMRES(damping=0.5, rtol=1e-2))
        assert relative_error(flat(hg.grad), flat(cast.grad)) <= 1e-5

    def test_float16_with_the_scale_of_a_grad_scaler(self):
        """Losses so small that their gradients vanish in float16."""
        scaler = torch.amp.GradScaler("cpu")
        options = {"solver": bl.CG(damping=0.5e-5, rtol=1e-2), "on_failure": "ignore"}
        exact = self.hypergradient(self.losses(scale=1e-5), **options)

        def error(**more):
            losses = self.losses(torch.float16, 1e-5)
            return relative_error(flat(self.hypergradient(losses, **options, **more).grad), flat(exact.grad))

        assert error(loss_scale=scaler.get_scale()) <= 0.02 < 0.05 < error()

    def test_a_scale_that_overflows_is_no_number_and_raises(self):
        with pytest.raises(bl.SolverError, match=r"nan or (infinity|infinite)"):
            self.hypergradient(self.losses(torch.float16), loss_scale=2.0**40)
