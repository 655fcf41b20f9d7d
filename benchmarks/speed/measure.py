"""Interleaved times, their ratios, and peak memory above a baseline."""

import ctypes
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Relative error of a hypergradient against ours from which on a column is out of the ranking. After 100 iterations of
# CG in float32, other orders of summation differ by up to 1 %; what is wrong is off by a factor of 4 and more.
WRONG = 0.05


def interleave(
    columns: Mapping[str, Callable[[], Any]], budget: float, least: int = 3, most: int = 40, seed: int = 0
) -> dict[str, list[float]]:
    """Time calls that have been warmed up, round by round, in a new order each round.

    Args:
        columns: what to call. It must wait for the device itself.
        budget: seconds after which no further round begins.
        least: rounds that are run whatever they take.
        most: rounds after which to stop.
        seed: of the orders.
    """
    order, rng = list(columns), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in columns}
    gc.collect()
    gc.freeze()  # collecting looks at what is new only
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > budget:
            break
        rng.shuffle(order)
        for name in order:
            gc.collect()  # so that no column pays for another's garbage
            before = time.perf_counter()
            result = columns[name]()
            seconds[name].append(time.perf_counter() - before)
            del result
    gc.unfreeze()
    return seconds


def quartiles(values: Any) -> list[float]:
    """Return the lower quartile, the median and the upper quartile, to four digits."""
    return [float(f"{q:.4g}") for q in np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])]


def relative_error(answer: Any, reference: Any) -> float:
    """Return norm(answer - reference) / norm(reference) of two lists of arrays; inf if anything is not finite."""
    x, y = (np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in arrays]) for arrays in (answer, reference))
    error = float(np.linalg.norm(x - y) / np.linalg.norm(y))
    return float(f"{error:.2g}") if np.isfinite(error) else float("inf")


def compare(
    columns: Mapping[str, Callable[[], Any]],
    reference: str,
    baseline: str,
    unchecked: tuple[str, ...],
    budget: float,
    least: int = 3,
) -> dict[str, Any]:
    """Check each column's answer against that of ``reference``, then time them all and divide by ``baseline``.

    Where there are several baselines, whose names all begin like ``baseline``, each column is divided by the fastest of
    them too. ``unchecked`` have another answer by design, such as a plain training step.
    """
    expected: list[np.ndarray] = []
    result: dict[str, Any] = {name: {} for name in columns}
    working = dict(columns)
    for name in sorted(columns, key=lambda name: name != reference):  # it goes first, for the others to be checked
        try:
            answer = as_arrays(columns[name]())
        except Exception as error:  # a peer that cannot do this; said in the table
            del working[name]
            result[name] |= {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            if name in (reference, baseline):
                raise
            continue
        if name == reference:
            expected = answer
        if name not in unchecked:
            result[name]["error"] = relative_error(answer, expected)
    del answer, expected
    seconds = {name: np.asarray(values) for name, values in interleave(working, budget, least).items()}
    best = min((name for name in seconds if name.startswith(baseline)), key=lambda name: np.median(seconds[name]))
    for name, values in seconds.items():
        result[name] |= {
            "seconds": quartiles(values),
            "ratio": quartiles(values / seconds[baseline]),
            "ratio_to_best": quartiles(values / seconds[best]),
            "rounds": len(values),
        }
    return result


def as_arrays(answer: Any) -> list[np.ndarray]:
    """Copy a list of tensors or arrays to NumPy."""
    return [np.array(a.detach().cpu() if hasattr(a, "detach") else a) for a in answer]


def peak_memory(prepare: Callable[[], Any], call: Callable[[], Any], device: str = "cpu") -> int:
    """Return the bytes that a call needs beyond what there is before it, results included.

    On the CPU the peak of the resident set, which Linux keeps and resets on demand; to be run in a process of its own.
    ``prepare`` starts thread pools and the like, and must leave nothing behind.
    """
    prepare()
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # give back what the allocator has kept
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = call()
    del result
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Read a number of bytes from what Linux says about this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only.")


# For processes that measure memory: freed blocks go back at once, so that the resident set is what is alive.
FRUGAL_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def machine() -> dict[str, Any]:
    """Return what kind of machine this is, without its name."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": cores, "memory_gib": round(pages / 2**30), "system": sys.platform}
