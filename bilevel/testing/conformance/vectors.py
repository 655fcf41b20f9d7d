"""The laws of a `Space`: trees of arrays as vectors, against NumPy."""

import numpy as np

from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.framework import Framework, vector
from bilevel.testing.conformance.subject import dtype_of
from bilevel.testing.conformance.systems import SIZE, normal

NAN, INF = float("nan"), float("inf")


def dot(f: Framework) -> None:
    """The dot product of two trees is a scalar: the sum of the products of all entries, without conjugates."""
    (x, x_), (y, y_) = f.draw(1), f.draw(2)
    got = f.run(lambda space, x, y: space.dot(x, y), x_, y_)
    f.equal("dot(x, y).shape", tuple(got.shape), ())
    f.close("dot(x, y)", f.host(got), x @ y)
    f.equal("dot of trees without entries", float(f.host(f.run(lambda space, x: space.dot(x, x), f.array([])))), 0.0)


def dot_of_half_precision(f: Framework) -> None:
    """Dot products accumulate in at least float32: in bfloat16, a sum of ones would stop at 256."""
    ones = f.array(np.ones(1000), "bfloat16")
    got = f.run(lambda space, x: space.dot(x, x), ones)
    f.require(dtype_of(got) in ("float32", "float64"), "dtype of a dot of bfloat16", "float32 or more", dtype_of(got))
    f.equal("dot of 1000 ones in bfloat16", float(f.host(got)), 1000.0)


def axpy(f: Framework) -> None:
    """alpha x + y keeps the dtypes, whether alpha is a Python number or a scalar of the framework."""
    (x, x_), (y, y_) = f.draw(1), f.draw(2)
    by_number = f.run(lambda space, x, y: space.axpy(-0.5, x, y), x_, y_)
    f.keeps("axpy(-0.5, x, y)", by_number, x_)
    f.close("axpy(-0.5, x, y)", f.flat(by_number), -0.5 * x + y)
    by_scalar = f.run(lambda space, x, y: space.axpy(space.dot(x, x), x, y), x_, y_)
    f.keeps("axpy(x·x, x, y)", by_scalar, x_)
    f.close("axpy(x·x, x, y)", f.flat(by_scalar), (x @ x) * x + y)


def scale(f: Framework) -> None:
    """alpha x keeps the dtypes, whether alpha is a Python number or a scalar of the framework."""
    x, x_ = f.draw(1)
    by_number = f.run(lambda space, x: space.scale(3.0, x), x_)
    f.keeps("scale(3.0, x)", by_number, x_)
    f.close("scale(3.0, x)", f.flat(by_number), 3 * x)
    by_scalar = f.run(lambda space, x: space.scale(space.dot(x, x), x), x_)
    f.keeps("scale(x·x, x)", by_scalar, x_)
    f.close("scale(x·x, x)", f.flat(by_scalar), (x @ x) * x)


def axpby_where(f: Framework) -> None:
    """alpha x + beta y replaces y if the flag is true; otherwise y stays, also if x has a nan."""
    (x, x_), (y, y_) = f.draw(1), f.draw(2)
    bad = f.tree(np.full(SIZE, NAN))

    def updates(space, x, y, bad):
        alpha, flag = space.dot(x, x), space.dot(x, x) > 0

        def new():  # axpby_where may overwrite its y
            return space.scale(1.0, y)

        return [
            space.axpby_where(flag, alpha, x, new()),
            space.axpby_where(flag, 1, x, new(), alpha),
            space.axpby_where(~flag, alpha, bad, new(), alpha),
        ]

    expected = {
        "axpby_where(True, x·x, x, y)": (x @ x) * x + y,
        "axpby_where(True, 1, x, y, x·x)": x + (x @ x) * y,
        "axpby_where(False, x·x, nan, y, x·x)": y,
    }
    for (what, value), got in zip(expected.items(), f.run(updates, x_, y_, bad), strict=True):
        f.keeps(what, got, x_)
        f.close(what, f.flat(got), value)


def mixed_precision(f: Framework) -> None:
    """In a tree of several dtypes, each leaf keeps its dtype, and eps belongs to the coarsest."""
    x_ = {"single": f.array(normal(1, 2), "float32"), "double": f.array(normal(2, 2), "float64")}
    results = f.run(
        lambda space, x, y: {
            "axpy": space.axpy(space.dot(x, x), x, x),
            "scale": space.scale(space.dot(x, x), x),
            "unravel(ravel)": space.unravel(space.ravel(x)),
            "map": space.map(lambda a, b: a / b, x, y),
        },
        x_,
        {"single": x_["double"], "double": x_["single"]},
    )
    for what, result in results.items():
        f.keeps(what, result, x_)
    f.equal("eps of float32 and float64", f.backend.space(x_).eps, float(np.finfo(np.float32).eps))


def zeros(f: Framework) -> None:
    """Zeros have the structure, shapes and dtypes of the tree, and are zero also where the tree is nan."""
    x_ = f.tree(np.full(SIZE, NAN))
    got = f.run(lambda space, x: space.zeros(), x_)
    f.keeps("zeros()", got, x_)
    f.equal("zeros() where like is nan", f.flat(got), np.zeros(SIZE))


def map_entries(f: Framework) -> None:
    """An entrywise function of trees is applied leaf by leaf, and keeps the dtypes of the first tree."""
    (x, x_), (y, y_) = f.draw(1), f.draw(2)
    got = f.run(lambda space, x, y: space.map(lambda a, b: a * b + a, x, y), x_, y_)
    f.keeps("map(function, x, y)", got, x_)
    f.close("map(a b + a, x, y)", f.flat(got), x * y + x)


def where(f: Framework) -> None:
    """The flag selects one tree, also if the other tree has a nan."""
    x, x_ = f.draw(1)
    bad = f.tree(np.full(SIZE, NAN))
    for what, order in (
        ("where(True, x, nan)", lambda s, x, bad: s.where(s.dot(x, x) > 0, x, bad)),
        ("where(False, nan, x)", lambda s, x, bad: s.where(s.dot(x, x) < 0, bad, x)),
    ):
        got = f.run(order, x_, bad)
        f.keeps(what, got, x_)
        f.equal(what, f.flat(got), x)


def normal_draws(f: Framework) -> None:
    """Normal draws repeat for a seed, differ between seeds and between leaves, and keep shapes and dtypes."""
    x_ = {"a": f.array(np.zeros(500)), "b": f.array(np.zeros(500))}

    def draw(space, x):
        return space.normal(0), space.normal(1)

    (first, other), (again, _) = f.run(draw, x_), f.run(draw, x_)
    f.keeps("normal(0)", first, x_)
    f.equal("normal(0), drawn again", f.flat(again), f.flat(first))
    a, b, c = f.flat(first)[:500], f.flat(first)[500:], f.flat(other)[:500]
    for what, y in (("two leaves", b), ("two seeds", c)):
        correlation = float(np.corrcoef(a, y)[0, 1])
        f.require(abs(correlation) < 0.3, f"correlation of {what}", "about 0", correlation)
    f.require(abs(a.mean()) < 0.2 and abs(a.std() - 1) < 0.2, "mean and deviation", "0, 1", (a.mean(), a.std()))


def max_abs(f: Framework) -> None:
    """The largest absolute entry is a scalar: nan if an entry is nan, 0 if there is no entry."""
    x, x_ = f.draw(1)
    one_nan = f.tree(np.where(np.arange(SIZE) == 3, NAN, x))
    for what, tree, expected in (("x", x_, np.abs(x).max()), ("no entry", f.array([]), 0.0), ("a nan", one_nan, NAN)):
        got = f.run(lambda space, x: space.max_abs(x), tree)
        f.equal("max_abs(x).shape", tuple(got.shape), ())
        same = np.array_equal(f.host(got), expected, equal_nan=True)
        f.require(same, f"max_abs of {what}", expected, got)


def isfinite(f: Framework) -> None:
    """A tree is finite unless an entry is nan or infinite. A tree without entries is finite."""
    x, x_ = f.draw(1)
    cases = [(x_, True), (f.array([]), True)]
    cases += [(f.tree(np.where(np.arange(SIZE) == 3, bad, x)), False) for bad in (NAN, INF, -INF)]
    for tree, expected in cases:
        got = f.run(lambda space, x: space.isfinite(x), tree)
        f.equal(f"isfinite of {f.flat(tree)}", bool(f.backend.to_host(got)), expected)


def eps_and_size(f: Framework) -> None:
    """eps and size are Python numbers: the machine epsilon of the dtype, and the number of entries."""
    _, x_ = f.draw(1)
    f.equal("eps", (type(f.backend.space(x_).eps), f.backend.space(x_).eps), (float, f.eps))
    f.equal("size", (type(f.backend.space(x_).size), f.backend.space(x_).size), (int, SIZE))


def ravel_unravel(f: Framework) -> None:
    """ravel gives one array of shape (n,), leaf after leaf, and unravel restores the structure."""
    _, x_ = f.draw(1)
    flat, back = f.run(lambda space, x: (space.ravel(x), space.unravel(2 * space.ravel(x))), x_)
    f.equal("ravel(x).shape", tuple(flat.shape), (SIZE,))
    f.equal("ravel(x) and the leaves in order", vector(f, x_), f.flat(x_))
    f.keeps("unravel(2 ravel(x))", back, x_)
    f.equal("unravel(2 ravel(x))", f.flat(back), 2 * f.flat(x_))


def materialise(f: Framework) -> None:
    """The columns of an operator's matrix are the images of the unit vectors."""
    matrix = normal(3, SIZE, SIZE).astype(f.dtype)
    _, x_ = f.draw(1)
    got = f.run(lambda space, x, m: space.materialise(lambda v: space.unravel(m @ space.ravel(v))), x_, f.array(matrix))
    f.close("materialise(v -> M v)", f.host(got), matrix)


def numpy_callback(f: Framework) -> None:
    """A function on the host gets float64 NumPy arrays. The dtype and shape of its result are the last argument's."""
    matrix, x = normal(3, SIZE, SIZE).astype(f.dtype), f.draw(1)[0]
    kinds = []

    def function(m, v):
        kinds.append((type(m), m.dtype, type(v), v.dtype))
        return m @ v

    arrays = f.array(matrix), f.array(x)
    got = f.run(lambda space, m, v: space.numpy_callback(function, m, v), *arrays)
    f.keeps("numpy_callback(function, m, v)", got, arrays[1])
    f.close("numpy_callback(m @ v)", f.host(got), matrix.astype(np.float64) @ x)
    f.equal("types and dtypes on the host", kinds[-1], (np.ndarray, np.float64) * 2)


def stacks(f: Framework) -> None:
    """A stack starts with zeros, returns the vectors set in it, and acts as a matrix in products and combinations."""
    (x, x_), (y, y_) = f.draw(1), f.draw(2)

    def fill(space, x, y):
        first = space.xp.zeros_like(space.dot(x, x), dtype=space.xp.int32)
        stack = space.set(space.set(space.stack(3), first, x), first + 2, y)
        taken = [space.get(stack, first + i) for i in range(3)]
        dots = space.stack_dot(stack, y)
        sums = space.linear_combination(dots, stack)
        # A preconditioner draws a stack of signs.
        signs = space.map(lambda z: space.leaf_xp.where(z < 0, -1.0, 1.0), space.normal(0, 3))
        return taken, dots, sums, [space.get(signs, first + i) for i in range(3)]

    taken, dots, sums, signs = f.run(fill, x_, y_)
    rows = np.stack([x, 0 * x, y])
    for i in range(3):
        f.keeps(f"get(stack, {i})", taken[i], x_)
        f.equal(f"get(stack, {i})", f.flat(taken[i]), f.flat(f.tree(rows[i])))
    f.close("stack_dot(stack, y)", f.host(dots), rows @ y)
    f.keeps("linear_combination(coefficients, stack)", sums, x_)
    f.close("linear_combination(coefficients, stack)", f.flat(sums), rows.T @ (rows @ y))
    flat = np.stack([f.flat(vector) for vector in signs])
    f.equal("sizes of the signs of a stack of normal draws", np.abs(flat), np.ones((3, SIZE)))
    f.require(len(np.unique(flat, axis=0)) > 1, "signs of a stack of normal draws", "different vectors", flat)


PER_DTYPE: list[Law] = [
    dot,
    axpy,
    scale,
    axpby_where,
    zeros,
    map_entries,
    where,
    normal_draws,
    max_abs,
    isfinite,
    eps_and_size,
    ravel_unravel,
    materialise,
    numpy_callback,
    stacks,
]
LAWS: list[Law] = [mixed_precision, dot_of_half_precision]
