"""Errors of `FirstOrder` against the length of its step, in float32 and under autocast in bfloat16.

A small transformer learns sequences of a random Markov chain by 300 steps of AdamW. Printed for each length: the
relative error of (∂²L/∂λ∂w)ᵀ c for c = ∂F/∂w, with a weight for each of 16 sequences, against second derivatives in
float32.

    OMP_NUM_THREADS=1 python -m benchmarks.first_order.precision
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import bilevel_torch
from benchmarks.first_order.sources import Size, Transformer, losses

SIZE = Size(vocabulary=200, words=32, width=64, layers=2)
SEQUENCES, STEPS = 16, 300
LENGTHS = ("auto", 0.01, 0.03, 0.1, 0.3, 1.0)


def sampler() -> Callable[[], Tensor]:
    """Return a function that draws sequences of one chain."""
    generator = torch.Generator().manual_seed(1)
    chain = torch.randn(SIZE.vocabulary, SIZE.vocabulary, generator=generator).mul(2).softmax(-1)

    def draw() -> Tensor:
        x = torch.randint(SIZE.vocabulary, (SEQUENCES, 1), generator=generator)
        for _ in range(SIZE.words):
            x = torch.cat([x, torch.multinomial(chain[x[:, -1]], 1, generator=generator)], 1)
        return x

    return draw


def main() -> None:
    """Print a line for each precision and length."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, draw = Transformer(SIZE), sampler()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses(net, draw()).mean().backward()
        optimizer.step()
    train, validation = draw(), draw()
    scores, params = torch.zeros(SEQUENCES, requires_grad=True), list(net.parameters())

    def inner(bfloat16: bool) -> Tensor:
        return (scores.exp() * losses(net, train, bfloat16)).mean()

    def outer(bfloat16: bool) -> Tensor:
        return losses(net, validation, bfloat16).mean()

    with sdpa_kernel(SDPBackend.MATH):
        c = torch.autograd.grad(outer(False), params)
        grads = torch.autograd.grad(inner(False), params, create_graph=True)
        (exact,) = torch.autograd.grad(grads, [scores], c)
    for bfloat16 in (False, True):
        for length in LENGTHS:
            method = bilevel_torch.FirstOrder(net, scores, perturbation=length)
            hg = method.backward(partial(inner, bfloat16), partial(outer, bfloat16))
            cross = -hg.grad / method.state_dict()["multiple"]
            error = float((cross - exact).norm() / exact.norm())
            print(f"{'bfloat16' if bfloat16 else 'float32':>9}, r = {length!s:>5}: error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
