"""The examples for JAX users: each runs as it is, improves on what it starts from, and has the right hypergradient."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel as bl
from bilevel.testing import check_hypergradient

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("sklearn")
jnp = jax.numpy

EXAMPLES = Path(__file__).parents[2] / "examples" / "jax"
pytestmark = pytest.mark.slow


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits(count):
    """Few images of few pixels, so that dense Hessians are cheap."""
    x = jax.random.uniform(jax.random.key(0), (count, 8))
    return x, jnp.arange(count) % 3


def linear():
    kernel, bias = (0.1 * jax.random.normal(jax.random.key(i), shape) for i, shape in ((1, (8, 3)), (2, (3,))))
    return {"kernel": kernel, "bias": bias}


def check(problem, hparams, inner_args, params=None):
    params = linear() if params is None else params
    check_hypergradient(problem, params, hparams, inner_args=inner_args, outer_args=digits(9), solver=bl.CG(rtol=1e-10))


def test_optax():
    module = example("optax_loop")
    traces, inner = [], module.inner

    def counted(*args):
        traces.append(1)
        return inner(*args)

    check(module.problem, jnp.linspace(-1.0, 1.0, 12), digits(12))
    module.problem = bl.Problem(counted, module.outer)
    counts = []
    for steps in (2, 12):
        traces.clear()
        result = module.main(["--steps", str(steps)])
        counts.append(len(traces))
    assert counts[0] == counts[1]  # one trace, however many steps
    assert result["unsolved"] == 0
    assert result["after"]["validation_loss"] < 0.8 * result["before"]["validation_loss"]
    assert result["after"]["test"] > result["before"]["test"]
    assert result["right"] > result["wrong"] + 0.3


def test_flax():
    pytest.importorskip("flax")
    module = example("flax_nnx")
    nnx = pytest.importorskip("flax.nnx")

    class Small(nnx.Module):
        def __init__(self):
            self.only = nnx.Linear(8, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)

        def __call__(self, x):
            return self.only(x)

    params = nnx.state(Small(), nnx.Param)
    check(module.make_problem(Small()), jax.tree.map(lambda w: jnp.full_like(w, -3.0), params), digits(12), params)
    result = module.main(["--steps", "4"])
    assert result["after"]["validation_loss"] < result["before"]["validation_loss"]


def test_equinox():
    eqx = pytest.importorskip("equinox")
    module = example("equinox_loop")
    params, static = eqx.partition(module.Classifier(jax.random.key(0)), eqx.is_inexact_array)
    images = jax.random.uniform(jax.random.key(1), (10, 64))
    training = module.make_training(static, bl.CG(rtol=1e-10))
    module.INNER_STEPS = 3000  # to the minimum, which is what the gradient is of

    @jax.jit
    def loss(images):
        return module.cross_entropy(eqx.combine(training(images, params), static), images[::-1], jnp.arange(10))

    direction = jax.random.normal(jax.random.key(2), images.shape)
    step = 1e-4
    difference = (loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
    assert float(jnp.vdot(jax.grad(loss)(images), direction)) == pytest.approx(float(difference), rel=1e-5)
    module.INNER_STEPS = 100
    result = module.main(["--steps", "15"])
    assert result["after"]["validation_loss"] < 0.8 * result["before"]["validation_loss"]
    assert result["after"]["test"] > result["before"]["test"]


def test_own_solver(tmp_path):
    """With another solver, by a file."""
    module = example("own_solver")
    problem = bl.Problem(module.inner, lambda params, h, x, y: module.cross_entropy(params, x, y))
    check(problem, jnp.linspace(-4.0, -2.0, 8), (digits(12),))
    config = tmp_path / "neumann.toml"
    config.write_text('[solver]\nname = "neumann"\nterms = 5\ndamping = 0.1')
    result = module.main(["--steps", "8", "--config", str(config)])
    assert result["after"]["validation_loss"] < 0.9 * result["before"]["validation_loss"]


def test_two_processes_print_the_same_as_one(capsys):
    module = example("processes")
    module.main(["--steps", "2"])
    expected = capsys.readouterr().out
    with socket.socket() as free:
        free.bind(("localhost", 0))
        options = ["--steps", "2", "--address", f"localhost:{free.getsockname()[1]}", "--processes", "2"]
    commands = [[sys.executable, EXAMPLES / "processes.py", *options, "--rank", rank] for rank in ("1", "0")]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    for process, output in zip(processes, ("", expected), strict=True):
        said, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert said.endswith(output)
