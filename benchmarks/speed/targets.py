"""The targets that were set for speed and memory, and what was measured of each."""

from collections.abc import Iterable
from math import log
from typing import Any

from benchmarks.speed.measure import WRONG

Record = dict[str, Any]
OURS, HAND, STEP = "ours", "hand-written", "plain step"
PEERS = ("TorchOpt", "Betty", "higher", "JAXopt", "Lineax", "Optimistix")
LARGE = 1_000_000


def targets(records: list[Record]) -> list[list[str]]:
    """Return rows of what, the target, what was measured, and whether it is met."""
    rows: list[list[str]] = []

    def row(what: str, target: str, measured: str, met: bool | None) -> None:
        rows.append([what, target, measured, {True: "met", False: "**not met**", None: "not measured"}[met]])

    def worst(what: str, target: str, found: dict[str, float], most: float) -> None:
        """Judge the worst of several figures, and show them all."""
        shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        row(what, target, shown, max(found.values()) <= most if found else None)

    timed = [r for r in records if r["kind"] == "times"]
    implicit = [r for r in timed if r["method"] != "unrolled"]
    for framework in ("torch", "jax"):
        of = [r for r in implicit if r["framework"] == framework]
        large = [r for r in of if r["weights"] > LARGE]
        large += [r for r in records if r["kind"] == "scale" and r["framework"] == framework and r["weights"] > LARGE]
        worst(f"time / fastest hand-written, 1 M and more weights, {framework}", "<= 1.00", _ratios(large), 1.0)
        small = [r for r in of if r["workload"] == "logistic"]
        worst(f"time / fastest hand-written, logistic regression, {framework}", "<= 1.10", _ratios(small), 1.1)
        row(f"ahead of every peer, implicit, {framework}", "all workloads", *_ahead(of))
        unrolled = [r for r in timed if r["framework"] == framework and r["method"] == "unrolled"]
        row(f"ahead of every peer, unrolled, {framework}", "all workloads", *_ahead(unrolled))
        worst(
            f"unrolled with checkpoints: time / plain unrolling, {framework}", "<= 1.4",
            _ratios(unrolled, "ours, checkpoints", "ratio"), 1.4,
        )  # fmt: skip
        memory = [r for r in records if r["kind"] == "memory" and r["framework"] == framework and "bytes" in r]
        for method, most in (("neumann", 1.0), ("cg", 0.9)):
            found = _memory_ratios(memory, method)
            worst(f"peak memory / hand-written, {method}, {framework}", f"<= {most:.2f}", found, most)
        growth = _growth(memory)
        worst(f"unrolled with checkpoints: growth of memory in T, {framework}", "T^0.5 (<= 0.6)", growth, 0.6)

    reads = {r["method"]: r["per_product"] for r in records if r["kind"] == "syncs" and r["where"] == "as on a GPU"}
    worst("host syncs per product, as on a GPU", "0", reads, 0.0)
    eager = {
        _name(r): 1e3 * (r["columns"]["ours, eager"]["seconds"][1] - r["columns"][OURS]["seconds"][1])
        for r in timed
        if "ours, eager" in r["columns"]
    }
    worst("eager JAX call, second time: ms beyond the jitted call", "<= 5", eager, 5.0)
    convnets = [r for r in implicit if r["framework"] == "jax" and r["workload"] == "convnet" and r["count"] == 10]
    worst("JAX convnet, K = 10: time / hand-written without a loop", "<= 1.1", _ratios(convnets), 1.1)
    for r in (r for r in records if r["kind"] == "joint"):
        found = {name: c["ratio"][1] for name, c in r["columns"].items() if name == "joint"}
        worst("joint / standard training, default solver: time", "<= 2", found, 2.0)
    memory = {r["column"]: r["bytes"] for r in records if r["kind"] == "joint memory"}
    if memory:
        worst("joint / standard training: memory", "<= 3", {"": memory["joint"] / memory["standard"]}, 3.0)
    for r in (r for r in records if r["kind"] == "amortised"):
        warm = {name: c for name, c in r["columns"].items() if name.endswith("warm")}
        steps = {name: c["plain_steps"][1] for name, c in warm.items()}
        worst(f"amortised outer step in plain steps, {r['data']}", "<= 5", steps, 5.0)
        row(f"amortised: as good as 20 products in less time, {r['data']}", "sooner", *_sooner(r["columns"]))
    return rows


def _name(r: Record) -> str:
    size = f" {r['weights'] / 1e6:.0f} M" if r["kind"] == "scale" else ""
    return f"{r['workload']}{size} {r['method']}-{r['count']}"


def _ratios(records: Iterable[Record], column: str = OURS, key: str = "ratio_to_best") -> dict[str, float]:
    return {_name(r): r["columns"][column][key][1] for r in records if key in r["columns"].get(column, {})}


def _ahead(records: list[Record]) -> tuple[str, bool | None]:
    """Tell where a peer with the right answer is faster, by medians."""
    faster, seen = [], False
    for r in records:
        mine = r["columns"][OURS]["seconds"][1]
        for name in PEERS:
            c = r["columns"].get(name, {})
            if "seconds" not in c or c["error"] > WRONG:
                continue
            seen = True
            if c["seconds"][1] < mine:
                faster.append(f"{name} by {mine / c['seconds'][1]:.2f} on {_name(r)}")
    return ("behind " + ", ".join(faster) if faster else "ahead everywhere"), (not faster if seen else None)


def _memory_ratios(records: list[Record], method: str) -> dict[str, float]:
    found: dict[tuple[str, int], dict[str, int]] = {}
    for r in records:
        if r["method"] == method:
            found.setdefault((r["workload"], r["count"]), {})[r["column"]] = r["bytes"]
    return {
        f"{workload} {method}-{count}": sizes[OURS] / sizes[HAND]
        for (workload, count), sizes in found.items()
        if OURS in sizes and HAND in sizes
    }


def _growth(records: list[Record]) -> dict[str, float]:
    """Return the power of the number of steps that memory grows with."""
    sizes = {r["count"]: r["bytes"] for r in records if r["column"] == "ours, checkpoints"}
    if len(sizes) < 2:
        return {}
    few, many = min(sizes), max(sizes)
    return {"power of T:": log(sizes[many] / sizes[few]) / log(many / few)}


def _sooner(columns: dict[str, Any]) -> tuple[str, bool]:
    goal = columns["20 products"]["seconds_to_goal"]
    warm = {name: c["seconds_to_goal"] for name, c in columns.items() if name.endswith("warm")}
    shown = ", ".join(f"{name} {'never' if s is None else f'{s:.2f} s'}" for name, s in warm.items())
    return f"{shown}; 20 products {goal:.2f} s", any(s is not None and s < goal for s in warm.values())
