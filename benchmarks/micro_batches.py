"""Compare a hypergradient over micro-batches with the same hypergradient on all data at once.

    python -m benchmarks.micro_batches
    python -m benchmarks.micro_batches --backends torch --networks mlp --data mnist.npz

10,000 images of 28 x 28 pixels in 40 micro-batches, a weight for each image and a weight decay as hyperparameters, and
10 products of CG. Printed are, for each framework and network,

- error: of the hypergradient in float64, relative to all data at once (target: 1e-10);
- time: in float32, divided by the time on all data at once (target: 1.1). All of them are warmed up and interleaved;
- memory: the peak above the data and the compiled program, divided by the peak for one micro-batch as the only data
  (target: 1.1), with 40 and with 20 micro-batches of 250 images. A separate process measures each peak, on Linux.

The images are random by default. The costs do not depend on the values. ``--data`` is an .npz file with arrays x, of
shape (n, 784) or (n, 28, 28), and y, of n >= 10,000 numbers below 10.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import numpy as np

import bilevel as bl
from benchmarks.speed.measure import FRUGAL_MALLOC, as_arrays, interleave, peak_memory, relative_error

IMAGES, SIZE = 10_000, 250
SOLVER = bl.CG(maxiter=10, rtol=None, damping=1.0)


def data(path: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images of shape (10000, 28, 28), their classes, and their numbers."""
    rng = np.random.default_rng(0)
    if path is None:
        x, y = rng.random((IMAGES, 28, 28)), rng.integers(0, 10, IMAGES)
    else:
        stored = np.load(path)
        x, y = stored["x"][:IMAGES].reshape(IMAGES, 28, 28) / stored["x"].max(), stored["y"][:IMAGES]
    return x, y.astype(np.int64), np.arange(IMAGES)


def weights(network: str) -> dict[str, np.ndarray]:
    """Return the initial weights of a network. Filters have the shape (out, in, height, width)."""
    rng = np.random.default_rng(1)
    shapes = {"a": (784, 200), "b": (200, 200), "c": (200, 10)}
    if network == "conv":
        shapes = {"a": (8, 1, 5, 5), "b": (16, 8, 5, 5), "c": (256, 10)}
    return {name: rng.standard_normal(shape) / max(shape[0], 20) ** 0.5 for name, shape in shapes.items()}


def torch_losses(network: str) -> tuple[Any, Any]:
    """Return the inner and the outer objective in PyTorch."""
    import torch
    from torch.nn import functional as F

    def entropies(w: Any, x: Any, y: Any) -> Any:
        if network == "mlp":
            h = torch.tanh(torch.tanh(x.flatten(1) @ w["a"]) @ w["b"])
        else:
            h = torch.relu(F.conv2d(torch.relu(F.conv2d(x[:, None], w["a"], stride=2)), w["b"], stride=2)).flatten(1)
        return F.cross_entropy(h @ w["c"], y, reduction="none")

    return _objectives(entropies, torch.sigmoid)


def jax_losses(network: str) -> tuple[Any, Any]:
    """Return the inner and the outer objective in JAX."""
    import jax
    import jax.numpy as jnp

    def conv(x: Any, filters: Any) -> Any:
        return jax.nn.relu(jax.lax.conv_general_dilated(x, filters, (2, 2), "VALID"))

    def entropies(w: Any, x: Any, y: Any) -> Any:
        if network == "mlp":
            h = jnp.tanh(jnp.tanh(x.reshape(len(x), -1) @ w["a"]) @ w["b"])
        else:
            h = conv(conv(x[:, None], w["a"]), w["b"]).reshape(len(x), -1)
        return -jnp.take_along_axis(jax.nn.log_softmax(h @ w["c"]), y[:, None], 1)[:, 0]

    return _objectives(entropies, jax.nn.sigmoid)


def _objectives(entropies: Any, sigmoid: Any) -> tuple[Any, Any]:
    def inner(w: Any, h: Any, x: Any, y: Any, index: Any) -> Any:
        decay = sum((v**2).sum() for v in w.values())
        return (sigmoid(h["weights"][index]) * entropies(w, x, y)).mean() + h["decay"] ** 2 * decay

    def outer(w: Any, h: Any, x: Any, y: Any, _: Any) -> Any:
        return entropies(w, x, y).mean()

    return inner, outer


class Case:
    """A problem in a framework and a precision, with its data."""

    def __init__(self, backend: str, network: str, dtype: str, path: str | None, images: int = IMAGES) -> None:
        if backend == "jax":
            import jax

            jax.config.update("jax_enable_x64", True)  # the dtypes are given
        self.backend = bl.get_backend(backend)
        inner, outer = torch_losses(network) if backend == "torch" else jax_losses(network)
        self.problem = bl.Problem(inner, outer)
        x, y, index = (array[:images] for array in data(path))
        self.w = {name: self._array(w, dtype) for name, w in weights(network).items()}
        self.h = {"weights": self._array(np.zeros(IMAGES), dtype), "decay": self._array(np.array(0.1), dtype)}
        self.data = self._array(x, dtype), self._array(y, "int64"), self._array(index, "int64")

    def _array(self, array: np.ndarray, dtype: str) -> Any:
        return self.backend.from_numpy(np.asarray(array, dtype))

    def run(self, split: bool) -> list[Any]:
        """Return the hypergradient, in micro-batches or on all data at once."""
        args = bl.MicroBatches(self.data, size=SIZE) if split else self.data
        hg = bl.hypergradient(
            self.problem, self.w, self.h, inner_args=args, outer_args=args, solver=SOLVER, on_failure="ignore"
        )
        grad = [hg.grad["weights"], hg.grad["decay"]]  # pyright: ignore
        if self.backend.name == "jax":
            import jax

            jax.block_until_ready(grad)
        return grad


def error(backend: str, network: str, path: str | None) -> float:
    """Return the relative error in float64."""
    case = Case(backend, network, "float64", path)
    return relative_error(as_arrays(case.run(True)), as_arrays(case.run(False)))


def time_ratio(backend: str, network: str, path: str | None) -> float:
    """Return the time in micro-batches divided by the time at once, the shortest of each."""
    case = Case(backend, network, "float32", path)
    columns = {"split": partial(case.run, True), "at once": partial(case.run, False)}
    for call in columns.values():
        call()
    seconds = interleave(columns, budget=60.0, least=3, most=10)
    return min(seconds["split"]) / min(seconds["at once"])


def peak(backend: str, network: str, path: str | None, images: int, split: bool) -> float:
    """Return the bytes of one call."""
    case = Case(backend, network, "float32", path, images)
    call = partial(case.run, split)
    return float(peak_memory(lambda: (call(), None)[1], call))


JOBS = {"error": error, "time": time_ratio, "peak": peak}


def measure(name: str, *arguments: Any) -> float:
    """Run a job in a separate process."""
    command = [sys.executable, "-m", "benchmarks.micro_batches", "--job", json.dumps([name, *arguments])]
    env = {**os.environ, **(FRUGAL_MALLOC if name == "peak" else {})}
    return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print the table, or run one job."""
    parser = argparse.ArgumentParser(description="Compare micro-batches with all data at once.")
    parser.add_argument("--backends", nargs="+", default=["torch", "jax"])
    parser.add_argument("--networks", nargs="+", default=["mlp", "conv"])
    parser.add_argument("--data")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        warnings.simplefilter("ignore")
        name, *arguments = json.loads(options.job)
        print(JOBS[name](*arguments))
        return
    for backend in options.backends:
        for network in options.networks:
            case = (backend, network, options.data)
            one = measure("peak", *case, SIZE, False)
            half, whole, at_once = (
                measure("peak", *case, images, split) / one
                for images, split in ((IMAGES // 2, True), (IMAGES, True), (IMAGES, False))
            )
            print(
                f"{backend} {network}: error {measure('error', *case):.1e}, time {measure('time', *case):.2f}, "
                f"memory {whole:.2f} (20 micro-batches: {half:.2f}, all data at once: {at_once:.1f}; "
                f"one micro-batch: {one / 1e6:.1f} MB)",
                flush=True,
            )


if __name__ == "__main__":
    main()
