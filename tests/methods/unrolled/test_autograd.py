"""Unrolls of a small network, against loops that the framework differentiates."""

import numpy as np
import pytest
from frameworks import framework, relative_error
from unrolled_cases import OPTIMIZERS, WAYS

import bilevel as bl

SIZES = {"a": (4, 5), "b": (4,), "c": (3, 4)}

DATA = [np.random.default_rng(i).standard_normal((2, 10, 5)) for i in range(3)]


class TestAgainstAutograd:
    """A hand-written unroll of a small network, differentiated by the framework itself."""

    @staticmethod
    def trees(make):
        rng = np.random.default_rng(7)
        params = {k: make(rng.standard_normal(s) / 2) for k, s in SIZES.items()}
        return params, {"decay": make(np.array(-1.0)), "weights": make(rng.standard_normal(10) / 3)}

    @staticmethod
    def losses(xp):
        def errors(p, x, y):
            return (xp.tanh(x @ p["a"].T + p["b"]) @ p["c"].T - y[:, :3]) ** 2

        def inner(p, h, x, y):
            penalty = xp.exp(h["decay"]) * sum((leaf**2).sum() for leaf in p.values())
            return (xp.exp(h["weights"]) * errors(p, x, y).sum(1)).mean() + 0.05 * penalty

        return inner, lambda p, h, x, y: errors(p, x, y).mean()

    @staticmethod
    def unroll(grad, p, h, data, xp, steps, optimizer="descent", step_size=0.0, momentum=0.0, beta1=0, beta2=0, eps=0):
        m = {k: 0 * w for k, w in p.items()}
        v = dict(m)
        for i in range(steps):
            g = grad(p, h, *data[i % len(data)])
            if optimizer == "adam":
                m = {k: beta1 * m[k] + (1 - beta1) * g[k] for k in p}
                v = {k: beta2 * v[k] + (1 - beta2) * g[k] ** 2 for k in p}
                hat = {k: (m[k] / (1 - beta1 ** (i + 1)), v[k] / (1 - beta2 ** (i + 1))) for k in p}
                p = {k: p[k] - step_size * hat[k][0] / (xp.sqrt(hat[k][1]) + eps) for k in p}
            else:
                m = {k: momentum * m[k] + g[k] for k in p}
                p = {k: p[k] - step_size * m[k] for k in p}
        return p

    @pytest.mark.parametrize("optimizer", ["heavy ball", "adam"])
    def test_torch(self, optimizer):
        torch = pytest.importorskip("torch")
        inner, outer = self.losses(torch)
        params, hparams = self.trees(torch.tensor)
        data = [tuple(map(torch.tensor, d)) for d in DATA]

        def grad(p, h, x, y):
            return dict(
                zip(p, torch.autograd.grad(inner(p, h, x, y), list(p.values()), create_graph=True), strict=True)
            )

        start = {k: w.clone().requires_grad_() for k, w in params.items()}
        hypers = {k: h.clone().requires_grad_() for k, h in hparams.items()}
        end = self.unroll(grad, start, hypers, data[:2], torch, 7, **OPTIMIZERS[optimizer])
        expected = torch.autograd.grad(outer(end, hypers, *data[2]), list(hypers.values()))
        self.compare(framework("torch"), inner, outer, params, hparams, data, optimizer, end, expected)

    def test_jax(self):
        optimizer = "adam"
        jax = pytest.importorskip("jax")
        inner, outer = self.losses(jax.numpy)
        params, hparams = self.trees(jax.numpy.asarray)
        data = [tuple(map(jax.numpy.asarray, d)) for d in DATA]

        @jax.jit
        def run(h):
            end = self.unroll(jax.grad(inner), params, h, data[:2], jax.numpy, 7, **OPTIMIZERS[optimizer])
            return outer(end, h, *data[2]), end

        expected, end = jax.grad(run, has_aux=True)(hparams)
        self.compare(framework("jax"), inner, outer, params, hparams, data, optimizer, end, list(expected.values()))

    def compare(self, backend, inner, outer, params, hparams, data, optimizer, end, expected):
        for way in WAYS.values():
            hg = bl.hypergradient(
                bl.Problem(inner, outer),
                params,
                hparams,
                inner_args=data[:2],
                outer_args=data[2],
                solver=bl.Unrolled(steps=7, **OPTIMIZERS[optimizer], **way),
            )
            for k, w in end.items():
                assert relative_error(backend.to_numpy(hg.params[k]), backend.to_numpy(w)) <= 1e-13
            for g, e in zip(hg.grad.values(), expected, strict=True):
                assert relative_error(backend.to_numpy(g), backend.to_numpy(e)) <= 1e-11

    def test_the_steps_are_those_of_torchs_adam(self):
        torch = pytest.importorskip("torch")
        inner, outer = self.losses(torch)
        params, hparams = self.trees(torch.tensor)
        x, y = map(torch.tensor, DATA[0])
        own = {k: w.clone().requires_grad_() for k, w in params.items()}
        optimizer = torch.optim.Adam(own.values(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            inner(own, hparams, x, y).backward()
            optimizer.step()
        hg = bl.hypergradient(
            bl.Problem(inner, outer),
            params,
            hparams,
            inner_args=(x, y),
            outer_args=(x, y),
            solver=bl.Unrolled(steps=20, optimizer="adam", step_size=1e-2),
            on_failure="ignore",
        )
        for k, w in own.items():
            assert torch.allclose(hg.params[k], w, rtol=1e-12)
