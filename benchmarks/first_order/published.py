"""Race the solvers of benchmark_bilevel on its task of data cleaning: test error and F1 against CPU time.

The task is its own: MNIST with half of the labels random, 5,000 images for validation, 10,000 for tests, and a linear
model with a weight for each training image. --images sets the number of training images, 20,000 there. With --net mlp,
the network is a perceptron 784-300-10 from random weights, with a smaller decay. Its loss of an image replaces the loss
in the repository's functions. The files are imported from a checkout (github.com/benchopt/benchmark_bilevel). The
solvers have the parameters of its file datacleaning0_5_best_params.yml. Stand-ins replace the few names of benchopt
that they import. "ours" is `bl.hypergradient` in each training step on the same functions, batches and initial values:
a Neumann series ("tracked") or three steps of CG, both from the last adjoint, and Adam with falling rates.

With --tune, each solver also runs for so many seconds with each setting of a grid, on another split of the images and
with seed 0. The smallest validation error chooses the setting. Compilation is not part of the time. Printed for each
solver: the means and standard errors at some times of the test error, and of the F1 score of the wrong labels. A label
is called wrong if its score is below 0, where the weight is 1/2. All scores start at -2. So the F1 score of the best
threshold and the AUC of the scores are also printed.

    OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false \
        python -m benchmarks.first_order.published --repository DIR --data DIR [--seconds 20] [--seeds 5]
"""

import argparse
import contextlib
import importlib
import importlib.util
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score

import bilevel as bl

sys.path.append(str(Path(__file__).parents[2] / "examples" / "paper"))
import data

PUBLISHED: dict[str, dict[str, Any]] = {
    "SABA": {"step_size": 0.1, "outer_ratio": 1e-3},
    "SRBA": {"step_size": 1e-3, "outer_ratio": 1e-5, "period_frac": 512.0},
    "StocBiO": {"step_size": 1e-2, "outer_ratio": 1e-5, "n_inner_steps": 10, "n_shia_steps": 10},
    "AmIGO": {"step_size": 1e-3, "outer_ratio": 1e-5, "n_inner_steps": 10},
    "SOBA": {"step_size": 1.0, "outer_ratio": 1e-4},
}
OURS: dict[str, dict[str, Any]] = {
    "ours, tracked": {"solver": {"name": "neumann", "terms": 1, "step_size": 0.05}, "rate": 3e-4},
    "ours, CG": {"solver": {"name": "cg", "maxiter": 3, "rtol": None}, "rate": 3e-4},
}
OUTER_RATE, FALL, BATCH, BLOCK = 0.1, 1000, 64, 128  # the rates fall as 1 / sqrt(1 + step / FALL)
HIDDEN, CLASSES, START = 300, 10, -2.0  # of the perceptron, of MNIST, and of the scores
DECAYS = {"linear": 0.2, "mlp": 1e-3}  # 0.2 is the repository's
SIZE = "n_train = 20000"  # a line of the repository's module
Measured = tuple[float, float, float, float, float]  # validation error, test error, F1, best F1, AUC


@dataclass(frozen=True)
class Task:
    """The two functions, as the repository's solvers expect them, and measurements."""

    inner: Callable[..., Any]  # of the weights, the scores, the first row and the size of a batch
    outer: Callable[..., Any]
    sizes: tuple[int, int]  # of the two sets of images
    weights: Callable[[int], jax.Array]  # initial ones, of a seed
    measure: Callable[[Any, Any], Measured]


class Base:
    """The part of a solver of benchopt that the files need."""

    def run_once(self, number: int) -> None:
        """Run some blocks of steps, to compile them."""
        calls = iter(range(number))
        self.run(lambda: next(calls, None) is not None)  # type: ignore[attr-defined]


def stand_ins() -> dict[str, Any]:
    """Return modules with the names of benchopt that the files import."""
    benchopt, stopping = ModuleType("benchopt"), ModuleType("benchopt.stopping_criterion")
    vars(benchopt).update(BaseSolver=Base, BaseDataset=object, safe_import_context=contextlib.nullcontext)
    vars(stopping).update(SufficientProgressCriterion=lambda **_: None)
    return {"benchopt": benchopt, "benchopt.stopping_criterion": stopping}


def task(repository: Path, folder: Path, images: int, net: str, state: int = 32) -> Task:
    """Return the task, from the repository's own module and with its random state."""
    split = data.mnist(folder)
    arrays: dict[str, Any] = {}
    for name, part in {"training": split.train, "test": split.test}.items():
        arrays[f"{name}_images"] = np.rint(255 * part.x).astype(np.uint8).reshape(len(part.x), -1)
        arrays[f"{name}_labels"] = part.y.astype(np.uint8)
    source = (repository / "datasets" / "mnist.py").read_text("utf-8")
    if source.count(SIZE) != 1:
        raise SystemExit(f"datasets/mnist.py: expected one line {SIZE!r}. Check out the commit that RESULTS.md names.")
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        Path("mnist.pkl").write_bytes(pickle.dumps(arrays))  # the module finds it in the working directory
        Path("mnist.py").write_text(source.replace(SIZE, f"n_train = {images}"), "utf-8")
        module, parts, truth = imported(Path("mnist.py")), [], []

        def recorded(*arrays: Any, **options: Any) -> Any:
            parts.extend(train_test_split(*arrays, **options))
            truth.append(parts[2].copy())  # the module then changes labels in place
            return parts

        train_test_split, module.train_test_split = module.train_test_split, recorded
        pixels = arrays["test_images"].shape[1]
        if net == "mlp":
            module.loss_sample = perceptron_loss
        dataset = module.Dataset()
        dataset.ratio, dataset.random_state, dataset.reg = 0.5, state, DECAYS[net]
        of = dataset.get_data()
    train, validation, labels, labels_validation = parts
    scaler = module.StandardScaler().fit(train)
    sets = [
        (jnp.array(scaler.transform(x)), y)
        for x, y in ((validation, labels_validation), (arrays["test_images"], arrays["test_labels"]))
    ]
    logits = jax.jit(perceptron if net == "mlp" else lambda w, x: x @ w.reshape(pixels, CLASSES))
    wrong = labels != truth[0]

    def measure(w: Any, scores: Any) -> Measured:
        errors = [float(np.mean(np.argmax(logits(w, x), 1) != y)) for x, y in sets]
        scores = np.nan_to_num(np.asarray(scores))
        precision, recall, _ = precision_recall_curve(wrong, -scores)
        best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9))
        auc = roc_auc_score(wrong, -scores)
        return errors[0], errors[1], float(f1_score(wrong, scores < 0)), float(best), float(auc)

    (inner, inner_samples, *_), (outer, outer_samples, *_) = of["pb_inner"], of["pb_outer"]
    start = partial(perceptron_weights, pixels) if net == "mlp" else lambda _: jnp.zeros(pixels * CLASSES)
    return Task(inner, outer, (inner_samples, outer_samples), start, measure)


def imported(path: Path) -> Any:
    """Return the module of a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def perceptron(w: Any, x: Any) -> Any:
    """Return the logits of images. The weights are one vector, as in the repository's solvers."""
    pixels = x.shape[-1]
    ends = np.cumsum([pixels * HIDDEN, HIDDEN, HIDDEN * CLASSES])
    first, bias, second, last = jnp.split(w, ends)
    return jax.nn.relu(x @ first.reshape(pixels, HIDDEN) + bias) @ second.reshape(HIDDEN, CLASSES) + last


def perceptron_loss(w: Any, scores: Any, x: Any, y: Any) -> Any:
    """Return the loss of one image, with the arguments of the repository's function."""
    out = perceptron(w, x)
    return jax.nn.logsumexp(out) - jnp.where(y == 1, out, 0).sum()


def perceptron_weights(pixels: int, seed: int) -> jax.Array:
    """Return random weights (He et al., ICCV 2015)."""
    first, second = jax.random.split(jax.random.PRNGKey(seed))
    parts = (
        jax.random.normal(first, (pixels * HIDDEN,)) * (2 / pixels) ** 0.5,
        jnp.zeros(HIDDEN),
        jax.random.normal(second, (HIDDEN * CLASSES,)) * (2 / HIDDEN) ** 0.5,
        jnp.zeros(CLASSES),
    )
    return jnp.concatenate(parts)


def published(name: str, of: Task, seed: int, setting: dict[str, Any]) -> Any:
    """Return a solver of the repository, compiled."""
    solver = importlib.import_module(f"solvers.{name.lower()}").Solver()
    for parameter, values in solver.parameters.items():
        setattr(solver, parameter, values[0])
    for parameter, value in setting.items():
        setattr(solver, parameter, value)
    solver.batch_size, solver.eval_freq, solver.random_state = BATCH, BLOCK, seed
    solver.set_objective(
        f_inner=of.inner,
        f_outer=of.outer,
        n_inner_samples=of.sizes[0],
        n_outer_samples=of.sizes[1],
        inner_var0=of.weights(seed),
        outer_var0=START * jnp.ones(of.sizes[0]),
    )
    return solver


class Ours(Base):
    """A loop of a training step and a hypergradient, with the same interface."""

    def __init__(self, of: Task, seed: int, setting: dict[str, Any]) -> None:
        inner, outer = (partial(f, batch_size=BATCH) for f in (of.inner, of.outer))
        problem, solver = bl.Problem(inner, outer), setting["solver"]
        sampler = importlib.import_module("benchmark_utils.minibatch_sampler").init_sampler
        keys = jax.random.split(jax.random.PRNGKey(seed), 2)
        (draw, rows), (draw_outer, others) = (sampler(n, BATCH, key) for n, key in zip(of.sizes, keys, strict=True))
        adam = optax.scale_by_adam()

        def step(carry: Any, number: Any) -> tuple[Any, None]:
            w, scores, moments, outer_moments, adjoint, rows, others, taken = carry
            first, *_, rows = draw(dict(rows))
            first_outer, *_, others = draw_outer(dict(others))
            fall = 1 / jnp.sqrt(1 + (taken + number) / FALL)
            # At the same weights and batch as the training step, so that the compiler computes the gradient once.
            hg = bl.hypergradient(
                problem,
                w,
                scores,
                inner_args=(first,),
                outer_args=(first_outer,),
                solver=solver,
                adjoint0=adjoint,
                on_failure="ignore",
            )
            direction: Any
            outer_direction: Any
            direction, moments = adam.update(jax.grad(inner)(w, scores, first), moments)
            outer_direction, outer_moments = adam.update(hg.grad, outer_moments)
            w, scores = w - setting["rate"] * fall * direction, scores - OUTER_RATE * fall * outer_direction
            return (w, scores, moments, outer_moments, hg.adjoint, rows, others, taken), None

        def block(carry: Any) -> Any:
            *carry, taken = jax.lax.scan(step, carry, jnp.arange(BLOCK))[0]
            return *carry, taken + BLOCK

        self.block = jax.jit(block)
        w, scores = of.weights(seed), START * jnp.ones(of.sizes[0])
        self.start = (w, scores, adam.init(w), adam.init(scores), jnp.zeros_like(w), rows, others, jnp.array(0))
        self.run_once(1)

    def run(self, callback: Callable[[], bool]) -> None:
        """Run blocks of steps until a function says no."""
        carry = self.start
        self.inner_var, self.outer_var = carry[:2]
        while callback():
            carry = self.block(carry)
            self.inner_var, self.outer_var = carry[:2]


def grid(name: str) -> list[dict[str, Any]]:
    """Return seven settings to choose from. The first one is in the tables above."""
    if name in PUBLISHED:
        base, pairs = PUBLISHED[name], [(step, outer) for step in (0.01, 0.1) for outer in (1e2, 1e3, 1e4)]
        return [base, *[base | {"step_size": step, "outer_ratio": step / outer} for step, outer in pairs]]
    base = OURS[name]
    changes: list[dict[str, Any]] = [
        {"terms": 0, "step_size": 0.03},
        {"terms": 0, "step_size": 0.1},
        {"step_size": 0.03},
    ]
    if name == "ours, CG":
        changes = [{"damping": damping} for damping in (0.01, 0.03, 0.1)]
    pairs = [(rate, change) for rate in (3e-4, 1e-3) for change in changes]
    return [base, *[{"rate": rate, "solver": base["solver"] | change} for rate, change in pairs]]


def timed(name: str, of: Task, seed: int, setting: dict[str, Any], seconds: float) -> list[tuple[float, Measured]]:
    """Return CPU seconds and measurements along a run."""
    solver = published(name, of, seed, setting) if name in PUBLISHED else Ours(of, seed, setting)
    spent = 0.0
    began: float | None = None
    points: list[tuple[float, Measured]] = []

    def callback() -> bool:
        nonlocal spent, began
        if began is not None:  # not in the first call
            jax.block_until_ready((solver.inner_var, solver.outer_var))
            spent += time.process_time() - began
            points.append((spent, of.measure(solver.inner_var, solver.outer_var)))
        began = time.process_time()
        return spent < seconds

    solver.run(callback)
    return points


def chosen(name: str, of: Task, seconds: float) -> dict[str, Any]:
    """Return the setting with the smallest validation error after some seconds of seed 0."""
    found = [(timed(name, of, 0, setting, seconds)[-1][1][0], setting) for setting in grid(name)]
    for error, setting in found:
        print(f"  {name}, validation error {100 * error:.2f}: {setting}", flush=True)
    return min(found, key=lambda pair: pair[0])[1]


def main(argv: list[str] | None = None) -> None:
    """Print lines for each solver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True, help="a checkout of benchmark_bilevel")
    parser.add_argument("--data", type=Path, required=True, help="the folder that has mnist/")
    parser.add_argument("--solvers", nargs="+", default=[*PUBLISHED, *OURS], choices=[*PUBLISHED, *OURS])
    parser.add_argument("--net", choices=list(DECAYS), default="linear")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--tune", type=float, default=0, help="seconds for each setting of the grid, 0: no grid")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    sys.modules.update(stand_ins())
    sys.path.insert(0, str(options.repository.resolve()))
    make = partial(task, options.repository, options.data, options.images, options.net)
    of, other = make(), make(33) if options.tune else None
    times = [options.seconds * part for part in (0.1, 0.25, 0.5, 1)]
    print(f"{'after':<28}" + "".join(f"{seconds:>12.1f} s" for seconds in times))
    for name in options.solvers:
        setting = chosen(name, other, options.tune) if other else (PUBLISHED | OURS)[name]
        runs = [timed(name, of, seed, setting, options.seconds) for seed in range(1, options.seeds + 1)]
        for title, column in {"test error (%)": 1, "F1 (%)": 2, "best F1 (%)": 3, "AUC (%)": 4}.items():
            reached = [[[m[column] for spent, m in run if spent <= limit][-1:] for limit in times] for run in runs]
            numbers = 100 * np.array([[found[0] if found else np.nan for found in run] for run in reached])
            means, spread = np.mean(numbers, 0), np.std(numbers, 0) / np.sqrt(max(options.seeds - 1, 1))
            cells = "".join(f"{f'{mean:.2f} ± {error:.2f}':>14}" for mean, error in zip(means, spread, strict=True))
            print(f"{name:<14}{title:<14}{cells}", flush=True)
        print(f"{name:<14}{BLOCK * np.median([len(run) for run in runs]):.0f} steps, {setting}", flush=True)


if __name__ == "__main__":
    main()
