"""The laws of a `Space`'s loops, branches, and functions of scalars."""

from typing import Any

import numpy as np

from bilevel.spaces.array import Array
from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.framework import Framework


def while_loop(f: Framework) -> None:
    """A loop runs while its flag is true, at most max_steps times, and takes no step if the flag is false at first."""
    for bound, most, expected in ((5.0, 100, 5.0), (5.0, 3, 3.0), (5.0, 0, 0.0), (-1.0, 100, 0.0)):

        def count(space: Any, zero: Array, bound: Array, most: int = most) -> Any:
            def live(state: Any) -> Array:
                return state[0] < bound

            def body(state: Any) -> Any:
                return space.xp.where(live(state), state[0] + 1, state[0]), space.where(
                    live(state), space.axpy(2.0, state[1], state[1]), state[1]
                )

            return space.while_loop(live, body, (zero, {"x": space.ravel(zero) + 1}), most)

        steps, tree = f.run(count, f.array(0.0), f.array(bound))
        what = f"with live: steps < {bound:g} and max_steps={most}"
        f.equal(f"steps of a loop {what}", float(f.host(steps)), expected)
        f.equal(f"3 ** steps of a loop {what}", f.flat(tree).tolist(), [3.0**expected])


def scan(f: Framework) -> None:
    """A scan passes its state through xs, forward or in reverse, and collects the outputs in the order of xs."""

    def forth_and_back(space: Any, start: Any) -> Any:
        state, squares = space.scan(lambda s, x: (s + 1, {"y": s * s}), start, None, 4)
        return state, space.scan(lambda s, x: (10 * s + x["y"], 10 * s), 0 * start, squares, 4, reverse=True)

    def seen(space: Any, start: Any) -> Any:
        state, (end, places) = forth_and_back(space, start)
        return state, end, space.scan(lambda s, x: (10 * s + x, None), 0 * start, places, 4)[0]

    state, end, read_back = (float(f.host(x)) for x in f.run(seen, f.array(1.0)))
    f.equal("state of a scan over nothing, 4 steps from 1", state, 5.0)
    f.equal("digits of 1, 4, 9, 16 read in reverse", end, 16 * 1000 + 9 * 100 + 4 * 10 + 1.0)
    # The reverse scan yields 0, 160, 1690, 16940 on its way from the last to the first.
    f.equal("its outputs, read forward", read_back, 16940 * 1000 + 1690 * 100 + 160 * 10 + 0.0)


def scan_of_no_steps(f: Framework) -> None:
    """A scan of length 0 returns its state."""
    got = f.run(lambda space, x: space.scan(lambda s, _: (s + 1, None), x, None, 0)[0], f.array(1.0))
    f.equal("state after 0 steps", float(f.host(got)), 1.0)


def cond(f: Framework) -> None:
    """A branch is taken if the flag is true; otherwise the state stays, also if the branch gives nan."""
    _, x_ = f.draw(1)
    got = f.run(lambda space, x: space.cond(space.dot(x, x) > 0, lambda x: space.scale(2.0, x), x), x_)
    f.equal("cond(True, double, x)", f.flat(got), 2 * f.flat(x_))
    got = f.run(lambda space, x: space.cond(space.dot(x, x) < 0, lambda x: space.scale(float("nan"), x), x), x_)
    f.keeps("cond(False, nan, x)", got, x_)
    f.equal("cond(False, nan, x)", f.flat(got), f.flat(x_))


def sequence(f: Framework) -> None:
    """A sequence of trees is indexed by a counter of a loop, and repeats after its end."""
    items = [{"x": f.array(np.full(2, float(i)))} for i in range(3)]

    def digits(space: Any, zero: Array, *items: Any) -> Array:
        at = space.sequence(items)

        def step(state: Any) -> Any:
            i, total = state
            return i + 1, 10 * total + at(i)["x"]

        first = space.xp.zeros_like(space.dot(zero, zero), dtype=space.xp.int32)
        return space.while_loop(lambda s: s[0] < 5, step, (first, items[0]["x"] * 0), 5)[1]

    got = f.run(digits, f.array(0.0), *items)
    f.equal("digits of items 0, 1, 2, 0, 1", f.host(got).tolist(), [1201.0, 1201.0])
    alone = f.run(lambda space, item: space.sequence([item])(7)["x"], items[1])
    f.equal("item 7 of a sequence of one", f.host(alone).tolist(), [1.0, 1.0])


def scalar_functions(f: Framework) -> None:
    """`space.xp` has the functions of scalars that solvers use, and they agree with NumPy's."""
    x = np.array([0.25, 4.0, 9.0], f.dtype)

    def apply(xp: Any, first: Any, one: Any, other: Any) -> dict[str, Any]:
        x = xp.stack([first, one, other])
        matrix = x[:, None] * x[None, :] + xp.where(x[:, None] == x[None, :], 1.0, 0.0 * x[0])
        return {
            "where": xp.where(one > 1, one, 0.0),
            "sqrt": xp.sqrt(one),
            "abs": xp.abs(-one),
            "maximum": xp.maximum(one, other),
            "minimum": xp.minimum(one, other),
            "log2, floor, exp2": xp.exp2(xp.floor(xp.log2(other))),
            "clip": xp.clip(one, -1.0, 1.0),
            "clip from below": xp.clip(-x, -1.0, None),
            "zeros_like": xp.zeros_like(one, dtype=xp.int32),
            "ones_like": xp.ones_like(one),
            "full_like": xp.full_like(one, 7.0),
            "stack": xp.stack([one, other]),
            "cumsum": xp.cumsum(x, 0),
            "max": xp.max(x),
            "min": xp.min(x),
            "sum": xp.sum(x),
            "isfinite, & and ~": xp.where(xp.isfinite(one) & ~(one > 5), 1.0, 0.0),
            "@ and .T": (matrix @ matrix.T)[0],
            "linalg.eigh": xp.linalg.eigh(matrix)[0],
            "linalg.svd": xp.linalg.svd(matrix)[1],
            "linalg.solve": xp.linalg.solve(matrix, x),
        }

    expected = apply(np, *x)
    roots = [f.array(root) for root in np.sqrt(x)]
    scalars = f.run(lambda space, *roots: apply(space.xp, *[space.dot(root, root) for root in roots]), *roots)
    for name, got in scalars.items():
        f.close(f"space.xp: {name}", f.host(got), np.asarray(expected[name], np.float64))
    bits = f.run(lambda space, x: x * space.xp.finfo(x.dtype).bits, f.array(1.0))
    f.equal("space.xp: finfo(dtype).bits", float(f.host(bits)), float(np.finfo(f.dtype).bits))


PER_DTYPE: list[Law] = [while_loop, cond, scalar_functions]
LAWS: list[Law] = [scan, scan_of_no_steps, sequence]
