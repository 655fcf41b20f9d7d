"""A linear training run whose metagradient follows from dense matrices, in every framework."""

import numpy as np

import bilevel as bl

N, M, T, RATE, MOMENTUM = 4, 3, 13, 0.2, 0.9
rng = np.random.default_rng(0)
MATRIX = np.diag([0.5, 1.0, 2.0, 3.0]) + 0.1 * rng.standard_normal((N, N))
COUPLING = rng.standard_normal((N, M))
TARGETS = rng.standard_normal((5, N))
W0, HPARAMS = rng.standard_normal(N), rng.standard_normal(M)
BATCHES = rng.standard_normal(T)


class Step:
    """m ← momentum m + A w − b C λ, w ← w − rate m, with analytic derivatives for the numpy backend."""

    def __init__(self, move):
        self.A, self.C = move(MATRIX, COUPLING)

    def __call__(self, state, hparams, b):
        m = MOMENTUM * state["m"] + self.A @ state["w"] - b * (self.C @ hparams)
        return state | {"w": state["w"] - RATE * m, "m": m}

    def vjp_params(self, state, hparams, v, b):
        m = v["m"] - RATE * v["w"]
        return {"w": v["w"] + self.A.T @ m, "m": MOMENTUM * m}

    def vjp_hparams(self, state, hparams, v, b):
        return -b * (self.C.T @ (v["m"] - RATE * v["w"]))


class Distance:
    """F = ½‖w − t‖² + Σλ; for targets of shape (Q, n), Q values."""

    def __call__(self, state, hparams, t):
        return 0.5 * ((state["w"] - t) ** 2).sum(-1) + hparams.sum()

    def grad(self, state, hparams, t):
        gap = state["w"] - t
        return {"w": gap, "m": np.zeros_like(gap)}, np.ones((*gap.shape[:-1], len(hparams)))


def training(move, outer=None, at=None):
    return bl.Training(Step(move), outer or Distance(), at)


def start(move):
    w, m = move(W0, np.zeros(N))
    return {"w": w, "m": m}


def expected(steps=T, targets=TARGETS[0]):
    """Return F, dF/dλ and dF/dw₀ by dense forward-mode recursions."""
    w, m = W0, np.zeros(N)
    by_hparams, by_start = [np.zeros((N, M))] * 2, [np.eye(N), np.zeros((N, N))]
    for b in BATCHES[:steps]:
        m = MOMENTUM * m + MATRIX @ w - b * COUPLING @ HPARAMS
        w = w - RATE * m
        for d, direct in ((by_hparams, b * COUPLING), (by_start, 0.0)):
            d[1] = MOMENTUM * d[1] + MATRIX @ d[0] - direct
            d[0] = d[0] - RATE * d[1]
    gap = w - targets
    return 0.5 * (gap**2).sum(-1) + HPARAMS.sum(), gap @ by_hparams[0] + 1, gap @ by_start[0]
