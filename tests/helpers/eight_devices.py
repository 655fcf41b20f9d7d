"""What must hold on eight devices, to be run by itself: they have to be there before JAX starts.

Prints what failed, and exits with how many checks that is.
"""

import os
import re
import sys
import traceback
import warnings
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory

# Little optimization: compiling is what takes the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_text import collectives, entries, loops
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bilevel as bl
import bilevel_jax

warnings.filterwarnings("ignore", "Error reading persistent compilation cache")  # see pyproject.toml
warnings.simplefilter("ignore", bl.InnerProblemWarning)  # derivatives are compared at any params

AUTO, EXPLICIT = (jax.make_mesh((8,), ("d",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit))
DATA, SAME = P("d"), P()
SOLVERS = {
    "cg": bl.CG(),
    "minres": bl.MINRES(),
    "neumann": bl.Neumann(terms=20),
    "nystrom": bl.CG(preconditioner=bl.NystromPreconditioner(rank=3)),
    "exact": bl.Exact(),
}


def inner(w, h, X, y):
    return jnp.mean(h["weight"] * (X @ w["w"] + w["b"] - y) ** 2) + jnp.sum(jnp.exp(h["decay"]) * w["w"] ** 2)


def outer(w, h, X, y):
    return jnp.mean((X @ w["w"] + w["b"] - y) ** 2)


def averaged(loss):
    return lambda *args: jax.lax.pmean(loss(*args), "d")


PROBLEM, AVERAGED = bl.Problem(inner, outer), bl.Problem(averaged(inner), averaged(outer))
KEYS = jax.random.split(jax.random.key(0), 6)
W = {"w": jax.random.normal(KEYS[4], (8,)), "b": jnp.asarray(0.3)}
H = {"decay": jax.random.normal(KEYS[5], (8,)), "weight": jnp.linspace(0.5, 1.5, 16)}
TRAIN, VAL = (
    (jax.random.normal(KEYS[i], (16, 8)), jax.random.normal(KEYS[i + 1], (16,))) for i in (0, 2)
)  # fmt: skip
SPECS = (SAME, {"decay": SAME, "weight": DATA}, (DATA, DATA), (DATA, DATA))
GRAD_SPEC = SPECS[1]


def call(problem, solver, w, h, train, val):
    return bl.hypergradient(problem, w, h, inner_args=train, outer_args=val, solver=solver)


def mapped(problem, solver, specs=SPECS, out_specs=GRAD_SPEC, mesh=AUTO, **options):
    def grad(*point):
        return call(problem, solver, *point).grad

    return jax.jit(jax.shard_map(grad, mesh=mesh, in_specs=specs, out_specs=out_specs, **options))


def place(mesh, specs, tree):
    specs = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, P))
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, specs)


def agree(x, expected, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def refuses(words, function, *args):
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, words))):
        function(*args)


def shard_map_with_the_loss_averaged_has_the_scale_of_one_device(solver):
    """A weight per example lives with its example; the decays, and the parameters, everywhere."""
    agree(mapped(AVERAGED, solver)(W, H, TRAIN, VAL), call(PROBLEM, solver, W, H, TRAIN, VAL).grad)


def shard_map_with_a_problem_per_device_solves_them_all(solver):
    def grad(*point):
        w, h = jax.tree.map(lambda a: a[0], point[:2])
        return jax.tree.map(lambda a: a[None], call(PROBLEM, solver, w, h, *point[2:]).grad)

    ws, hs = jax.tree.map(lambda a: jnp.stack([a + 0.1 * i for i in range(8)]), (W, H))
    specs = (DATA, DATA, SAME, SAME)
    many = jax.jit(jax.shard_map(grad, mesh=AUTO, in_specs=specs, out_specs=DATA))(ws, hs, TRAIN, VAL)
    for i in (0, 7):
        w, h, ours = jax.tree.map(lambda a, i=i: a[i], (ws, hs, many))
        agree(ours, call(PROBLEM, solver, w, h, TRAIN, VAL).grad)


def shard_map_inside_the_losses_is_fine():
    shared = {"decay": H["decay"], "weight": jnp.ones(2)}

    def inside(loss):
        specs = (SAME, SAME, DATA, DATA)
        return jax.shard_map(averaged(loss), mesh=AUTO, in_specs=specs, out_specs=SAME, check_vma=True)

    ours = call(bl.Problem(inside(inner), inside(outer)), "cg", W, shared, TRAIN, VAL).grad
    agree(ours["decay"], call(PROBLEM, "cg", W, {**shared, "weight": jnp.ones(16)}, TRAIN, VAL).grad["decay"])


def what_would_be_wrong_in_shard_map_is_refused():
    point = (W, H, TRAIN, VAL)
    summed = mapped(bl.Problem(averaged(inner), outer), "cg")
    refuses(["outer differs along the mesh axis 'd'", "params['b'] is the same", "jax.lax.pmean"], summed, *point)
    summed = mapped(bl.Problem(inner, averaged(outer)), "cg")
    refuses(["inner differs along the mesh axis 'd'", "jax.lax.pmean"], summed, *point)
    untracked = mapped(AVERAGED, "cg", check_vma=False)
    refuses(["psum over the axis 'd'", "check_vma=True"], untracked, *point)

    pieces = bl.Problem(
        lambda w, h: jax.lax.psum(jnp.sum(jnp.exp(h) * w**2), "d"), lambda w, h: jax.lax.psum(jnp.sum(w), "d")
    )
    hypergradient = jax.shard_map(
        lambda w, h: bl.hypergradient(pieces, w, h).grad, mesh=AUTO, in_specs=(DATA, DATA), out_specs=DATA
    )
    refuses(["params differs", "outer is the same there", "NamedSharding"], hypergradient, W["w"], H["decay"])


def named_sharding(mesh, specs):
    solver = bl.CG()
    expected = call(PROBLEM, solver, W, H, TRAIN, VAL)
    placed = [place(mesh, *pair) for pair in zip(specs, (W, H, TRAIN, VAL), strict=True)]
    for function in (partial(call, PROBLEM, solver), jax.jit(partial(call, PROBLEM, solver))):
        hg = function(*placed)
        agree((hg.grad, hg.adjoint), (expected.grad, expected.adjoint))
        assert hg.adjoint["w"].sharding.is_equivalent_to(placed[0]["w"].sharding, 1), hg.adjoint["w"].sharding


def a_deep_net_stays_sharded(mesh, params, gathers):
    """The loop gathers vectors layer by layer, and no params: XLA gathers their layers before the loop."""
    layers, size = 3, 16
    draw = np.random.default_rng(0).normal
    w = {str(i): jnp.asarray(0.3 * draw(size=(size, size))) for i in range(layers)}
    data = (jnp.asarray(draw(size=(24, size))), jnp.asarray(draw(size=(24, size))))

    def loss(w, h, X, y):
        for layer in w.values():
            X = jnp.tanh(X @ layer)
        return jnp.mean((X - y) ** 2)

    def regularized(w, h, X, y):
        return loss(w, h, X, y) + sum(jnp.sum(jnp.exp(h[i]) * layer**2) for i, layer in w.items())

    def hypergradient(*point):
        hg = call(bl.Problem(regularized, loss), bl.CG(damping=4.0), *point)
        return hg.grad, hg.adjoint

    h = jax.tree.map(lambda layer: jnp.full_like(layer, -2.0), w)
    placed = [place(mesh, *pair) for pair in zip((params, params, DATA, DATA), (w, h, data, data), strict=True)]
    compiled = jax.jit(hypergradient).lower(*placed).compile()
    found = compiled(*placed)
    agree(found, hypergradient(w, h, data, data), 1e-8)
    for a, given in zip(jax.tree.leaves(found), jax.tree.leaves((placed[1], placed[0])), strict=True):
        assert a.sharding.is_equivalent_to(given.sharding, a.ndim), a.sharding
    moved = collectives(loops(compiled.as_text()))
    assert set(moved) == {"all-gather", "all-reduce"}
    assert len(moved["all-gather"]) <= gathers, moved
    assert max(entries(shape) for shapes in moved.values() for shape in shapes) <= size**2


def arrays_on_different_devices_are_refused_by_name():
    first, second = (jax.device_put(W, device) for device in jax.devices()[:2])
    words = ["hparams['decay'] is on cpu:1, but params['b'] is on cpu:0: move one of them"]
    refuses(words, call, PROBLEM, "cg", first, jax.device_put(H, jax.devices()[1]), TRAIN, VAL)
    everywhere = "cpu:0, cpu:1, cpu:2, cpu:3, cpu:4, cpu:5, cpu:6, cpu:7"
    words = [f"hparams['decay'] is on {everywhere}, but params['b'] is on cpu:1"]
    refuses(words, call, PROBLEM, "cg", second, place(AUTO, SAME, H), TRAIN, VAL)
    agree(call(PROBLEM, "cg", second, H, TRAIN, VAL).grad, call(PROBLEM, "cg", W, H, TRAIN, VAL).grad)


def a_batch_over_devices_is_a_loop(solver):
    """A hypergradient for each of some hyperparameters, on the device that has them."""
    many = jax.tree.map(lambda a: jnp.stack([a + 0.1 * i for i in range(8)]), H)

    def grad(h):
        return call(PROBLEM, solver, W, h, TRAIN, VAL).grad

    ours = jax.jit(jax.vmap(grad))(place(AUTO, DATA, many))
    for i in (0, 7):
        one, h = jax.tree.map(lambda a, i=i: a[i], (ours, many))
        agree(one, grad(h))


def an_implicit_minimizer_works_on_sharded_arrays():
    specs = ({"w": DATA, "b": SAME}, {"decay": DATA, "weight": DATA}, (DATA, DATA), (DATA, DATA))
    w, h, train, val = (place(AUTO, *pair) for pair in zip(specs, (W, H, TRAIN, VAL), strict=True))
    solve = bilevel_jax.implicit_minimizer(inner)(lambda h, X, y: w)
    grad = jax.jit(jax.grad(lambda h, train, val: outer(solve(h, *train), h, *val)))
    agree(grad(h, train, val), call(PROBLEM, "cg", W, H, TRAIN, VAL).grad)


def an_implicit_minimizer_works_in_shard_map():
    solve = bilevel_jax.implicit_minimizer(averaged(inner))(lambda h, X, y: W)

    def grad(h, train, val):
        return jax.grad(lambda h: averaged(outer)(solve(h, *train), h, *val))(h)

    mapped = jax.jit(jax.shard_map(grad, mesh=AUTO, in_specs=SPECS[1:], out_specs=GRAD_SPEC))
    agree(mapped(H, TRAIN, VAL), call(PROBLEM, "cg", W, H, TRAIN, VAL).grad)


def an_implicit_minimizer_tells_a_failure_on_one_device():
    curvatures = jnp.ones((8, 2)).at[5].set(-1.0)

    def grad(c):
        def inner(w, h):
            return jnp.sum(c * w**2) / 2 - jnp.sum(h * w)

        solve = bilevel_jax.implicit_minimizer(inner, solver=bl.CG(damping=0.0))(lambda h: h / c)
        return jax.grad(lambda h: jnp.sum(solve(h)))(jnp.ones_like(c))

    def finished():
        grads = jax.jit(jax.shard_map(grad, mesh=AUTO, in_specs=DATA, out_specs=DATA))(curvatures)
        jax.block_until_ready(grads)
        jax.effects_barrier()
        return grads

    with pytest.warns(bl.SolverWarning, match="met non-positive curvature"):
        grads = finished()
    agree(jnp.delete(grads, 5, 0), jnp.ones((7, 2)))


def a_checkpoint_of_four_devices_is_loaded_on_two():
    if find_spec("orbax") is None:
        return
    import orbax.checkpoint as ocp

    four, two = (jax.make_mesh((n,), ("d",), (AxisType.Auto,), devices=jax.devices()[:n]) for n in (4, 2))
    specs = ({"w": DATA, "b": SAME}, {"decay": DATA, "weight": DATA}, SAME, SAME)
    w, h, train, val = (place(four, *pair) for pair in zip(specs, (W, H, TRAIN, VAL), strict=True))
    saved = call(PROBLEM, "cg", w, h, train, val)
    with TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/state", {"params": w, "hparams": h, "adjoint": saved.adjoint})
        checkpointer.wait_until_finished()
        w, h = (place(two, *pair) for pair in zip(specs[:2], (W, H), strict=True))
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
            {"params": w, "hparams": h, "adjoint": w},
        )
        loaded = checkpointer.restore(f"{folder}/state", like)
    train, val = place(two, SAME, (TRAIN, VAL))
    problem = bl.Problem(inner, outer)
    hg = bl.hypergradient(
        problem, loaded["params"], loaded["hparams"], inner_args=train, outer_args=val, adjoint0=loaded["adjoint"]
    )
    agree((hg.grad, hg.adjoint), (saved.grad, saved.adjoint))
    assert (saved.info.steps > 0, hg.info.steps) == (True, 0)
    assert hg.adjoint["w"].sharding.is_equivalent_to(w["w"].sharding, 1)


CHECKS = {
    **{
        f"one problem, {name}": partial(shard_map_with_the_loss_averaged_has_the_scale_of_one_device, SOLVERS[name])
        for name in ("cg", "minres", "neumann")
    },
    **{
        f"a problem per device, {name}": partial(shard_map_with_a_problem_per_device_solves_them_all, SOLVERS[name])
        for name in ("neumann", "nystrom", "exact")
    },
    "inside the losses": shard_map_inside_the_losses_is_fine,
    "refused": what_would_be_wrong_in_shard_map_is_refused,
    "data in pieces": partial(named_sharding, AUTO, SPECS),
    "params in pieces": partial(named_sharding, AUTO, ({"w": DATA, "b": SAME}, DATA, SAME, SAME)),
    "data in pieces, explicit": partial(named_sharding, EXPLICIT, SPECS),
    "params in pieces, explicit": partial(
        named_sharding, EXPLICIT, ({"w": DATA, "b": SAME}, {"decay": DATA, "weight": SAME}, SAME, SAME)
    ),
    "deep net as in FSDP": partial(a_deep_net_stays_sharded, AUTO, DATA, 3),
    "deep net on two axes": partial(
        a_deep_net_stays_sharded, jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2), P("d", "m"), 19
    ),
    "different devices": arrays_on_different_devices_are_refused_by_name,
    **{f"batch, {name}": partial(a_batch_over_devices_is_a_loop, SOLVERS[name]) for name in ("cg", "neumann")},
    "implicit minimizer": an_implicit_minimizer_works_on_sharded_arrays,
    "implicit minimizer in shard_map": an_implicit_minimizer_works_in_shard_map,
    "a checkpoint": a_checkpoint_of_four_devices_is_loaded_on_two,
    "failure of an implicit minimizer": an_implicit_minimizer_tells_a_failure_on_one_device,
}

failed = 0
for name, check in CHECKS.items():
    try:
        check()
    except Exception:
        failed += 1
        print(f"{name}\n{traceback.format_exc()}")
sys.exit(failed)
