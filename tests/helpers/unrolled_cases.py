"""Optimizers, modes and a quartic problem for the tests of unrolling."""

import numpy as np

import bilevel as bl

OPTIMIZERS = {
    "descent": {"step_size": 0.08},
    "heavy ball": {"step_size": 0.05, "momentum": 0.6},
    "adam": {"optimizer": "adam", "step_size": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3},
}

WAYS = {
    "reverse": {"mode": "reverse", "checkpoint": False},
    "checkpointed": {"mode": "reverse", "checkpoint": True},
    "forward": {"mode": "forward"},
}


class QuarticInner:
    """L = ½ mean (Xw − y)² + ¼ Σ w⁴ + ½ Σ (Sλ)² w²: its Hessian and its cross derivative depend on w and λ."""

    def __call__(self, w, h, X, y, S):
        return 0.5 * ((X @ w - y) ** 2).sum() / len(y) + (w**4).sum() / 4 + ((S @ h) ** 2 * w**2).sum() / 2

    def grad(self, w, h, X, y, S):
        return X.T @ (X @ w - y) / len(y) + w**3 + (S @ h) ** 2 * w

    def hvp(self, w, h, v, X, y, S):
        return X.T @ (X @ v) / len(y) + (3 * w**2 + (S @ h) ** 2) * v

    def cross_vjp(self, w, h, v, X, y, S):
        return S.T @ (2 * (S @ h) * w * v)

    def cross_jvp(self, w, h, u, X, y, S):
        return 2 * (S @ h) * w * (S @ u)


class QuarticOuter:
    """F = ½ ‖w − t‖² + dᵀλ."""

    def __call__(self, w, h, t, d):
        return ((w - t) ** 2).sum() / 2 + d @ h

    def grad(self, w, h, t, d):
        return w - t, d


PROBLEM = bl.Problem(QuarticInner(), QuarticOuter())

STEPS = 11  # no square


class Quartic:
    """Data for the problem above: three batches, six weights, four hyperparameters."""

    def __init__(self, seed=0, dtype=np.float64):
        rng = np.random.default_rng(seed)
        S = rng.standard_normal((6, 4))
        arrays = [(rng.standard_normal((8, 6)), rng.standard_normal(8), S) for _ in range(3)]
        self.batches = [tuple(a.astype(dtype) for a in batch) for batch in arrays]
        self.w, self.h, self.t, self.d = (rng.standard_normal(k).astype(dtype) for k in (6, 4, 6, 4))
        self.h *= 0.3

    def hypergradient(self, backend, batches, w=None, h=None, **options):
        """Unroll in a framework; None for ``batches``: the first one, as a tuple."""
        args = [tuple(map(backend.from_numpy, batch)) for batch in self.batches[: batches or 1]]
        return bl.hypergradient(
            PROBLEM,
            backend.from_numpy(self.w if w is None else w),
            backend.from_numpy(self.h if h is None else h),
            inner_args=args[0] if batches is None else args,
            outer_args=tuple(map(backend.from_numpy, (self.t, self.d))),
            solver=bl.Unrolled(**{"steps": STEPS, **options}),
            backend=backend,
            on_failure="ignore",
        )

    def by_hand(self, batches, steps=STEPS, truncation=None, optimizer="descent", **options):
        """Return w_K, F and dF/dλ of a plain loop in float64, by complex steps: no difference is taken."""
        grad = np.empty(4)
        for j in range(4):
            w, value = self._loop(batches, j, steps, truncation or steps, optimizer, **options)
            grad[j] = value.imag / 1e-30
        return w.real, value.real, grad

    def _loop(self, batches, j, steps, last, optimizer, step_size, momentum=0.0, beta1=0.0, beta2=0.0, eps=0.0):
        plain, moved = self.h.astype(complex), self.h.astype(complex)
        moved[j] += 1e-30j
        w, m, v = self.w.astype(complex), np.zeros(6, complex), np.zeros(6, complex)
        data = [tuple(a.astype(float) for a in batch) for batch in self.batches[: batches or 1]]
        for i in range(steps):
            g = PROBLEM.inner.grad(w, plain if i < steps - last else moved, *data[i % len(data)])
            if optimizer == "adam":
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
                w = w - step_size * (m / (1 - beta1 ** (i + 1))) / (np.sqrt(v / (1 - beta2 ** (i + 1))) + eps)
            else:
                m = momentum * m + g
                w = w - step_size * m
        return w, PROBLEM.outer(w, moved, self.t.astype(float), self.d.astype(float))


class SquaredNorm:
    """F = ½ ‖w‖²."""

    def __call__(self, w, h):
        return (w**2).sum() / 2

    def grad(self, w, h):
        return w, None
