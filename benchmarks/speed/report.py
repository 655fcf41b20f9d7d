"""Tables in Markdown from the records of a run."""

from collections.abc import Iterable
from typing import Any

from benchmarks.speed.measure import WRONG
from benchmarks.speed.targets import targets

Record = dict[str, Any]
METHODS = {"neumann": "Neumann", "cg": "CG", "unrolled": "unrolled"}
FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX"}
STEP, HAND = "plain step", "hand-written"


def markdown(result: dict[str, Any]) -> str:
    """Return all tables."""
    records: list[Record] = result["records"]
    parts = [_about(result["about"]), _table(["what", "target", "measured", ""], targets(records))]
    for framework, title in FRAMEWORKS.items():
        timed = [r for r in records if r["kind"] == "times" and r["framework"] == framework]
        for unrolled in (False, True):
            parts += _times(title, [r for r in timed if (r["method"] == "unrolled") == unrolled], unrolled)
    parts += _memory([r for r in records if r["kind"] == "memory"])
    for kind, function in KINDS.items():
        found = [r for r in records if r["kind"] in kind]
        parts += function(found) if found else []
    failed = [f"- {', '.join(r['jobs'])}: {r['error']}" for r in records if r["kind"] == "failed"]
    parts += ["**Jobs that failed:**\n\n" + "\n".join(failed)] if failed else []
    return "\n\n".join(parts) + "\n"


def between_markers(page: str, text: str, device: str) -> str:
    """Put a text between a page's markers for a device; at its end, with markers, if it has none."""
    begin, end = f"<!-- speed {device}: begin -->", f"<!-- speed {device}: end -->"
    block = f"{begin}\n\n{text}\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n## Speed, {device.upper()}\n\n{block}\n"
    before, _, rest = page.partition(begin)
    return before + block + rest.partition(end)[2]


def _about(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    what = about["machine"]
    where = about["accelerator"] or f"{what['cores']} cores of a server with {what['memory_gib']} GiB"
    quick = " A smoke test at tiny sizes: the numbers mean nothing." if about["quick"] else ""
    return (
        f"Measured on {about['date']} on {where} in {about['minutes']} minutes (load average before: "
        f"{what['load_before']}); {versions}.{quick}"
    )


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(q: list[float]) -> str:
    return f"{q[1]:.2f} ({q[0]:.2f}–{q[2]:.2f})"


def _seconds(s: float) -> str:
    size = abs(s)  # a difference of two times may be negative
    return f"{s:.1f} s" if size >= 1 else f"{1e3 * s:.3g} ms" if size >= 1e-3 else f"{1e6 * s:.3g} µs"


def _mib(size: float) -> str:
    return f"{size / 2**20:.4g}"


def _names(records: list[Record]) -> list[str]:
    """Return the columns of all records, ours last but for the peers, in the order in which they come."""
    return list(dict.fromkeys(name for r in records for name in r["columns"]))


def _cell(column: dict[str, Any] | None, key: str = "ratio") -> str:
    if column is None:
        return ""
    if "failed" in column:
        return "fails"
    wrong = column.get("error", 0.0) > WRONG
    return _spread(column[key]) + (f" **wrong**, error {column['error']:.2g}" if wrong else "")


def _times(title: str, records: list[Record], unrolled: bool) -> list[str]:
    if not records:
        return []
    names = [name for name in _names(records) if name != HAND]
    rows = [
        [
            r["workload"],
            f"{r['weights']:,}",
            f"{METHODS[r['method']]}, {r['count']}",
            _seconds(r["columns"][HAND]["seconds"][1]),
            *(_cell(r["columns"].get(name)) for name in names),
        ]
        for r in records
    ]
    what = "steps" if unrolled else "products"
    head = ["workload", "weights", f"method, {what}", HAND, *names]
    errors = sorted({f"{n}: {c['failed']}" for r in records for n, c in r["columns"].items() if "failed" in c})
    heading = f"**{title}, {'unrolled' if unrolled else 'implicit'}: time, as a multiple of the hand-written loop's**"
    return [heading, _table(head, rows), *(f"Fails — {error}" for error in errors)]


def _memory(records: list[Record]) -> list[str]:
    if not records:
        return []
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        rows.setdefault((r["framework"], r["workload"], r["method"], r["count"]), {})[r["column"]] = r
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [
        [FRAMEWORKS[f], workload, f"{METHODS[method]}, {count}", *(_memory_cell(row, name) for name in names)]
        for (f, workload, method, count), row in rows.items()
    ]
    heading = (
        "**Peak memory of a hypergradient beyond what there is before it: MiB (multiple of the hand-written loop's)**"
    )
    return [heading, _table(["", "workload", "method, products", *names], lines)]


def _memory_cell(row: dict[str, Record], name: str) -> str:
    if name not in row:
        return ""
    if "failed" in row[name]:
        return "fails"
    size, hand = row[name]["bytes"], row.get(HAND, {}).get("bytes")
    return _mib(size) + (f" ({size / hand:.2f})" if hand and name != HAND else "")


def _scale(records: list[Record]) -> list[str]:
    memory = {(r["framework"], r["method"], r["weights"], r["column"]): r for r in records if "column" in r}
    rows = []
    for r in records:
        if "columns" not in r:
            continue
        sizes = [
            memory.get((r["framework"], r["method"], r["weights"], c)) for c in (f"{HAND}, in place", HAND, "ours")
        ]
        per_weight = [f"{m['bytes'] / m['weights']:.1f}" for m in sizes if m and "bytes" in m]
        rows.append(
            [
                FRAMEWORKS[r["framework"]],
                METHODS[r["method"]],
                f"{r['weights']:,}",
                _seconds(r["columns"]["ours"]["seconds"][1]),
                _spread(r["columns"]["ours"]["ratio_to_best"]),
                *per_weight,
            ]
        )
    head = ["", "method", "weights", "ours", "/ fastest hand-written", "bytes per weight, hand-written", "ours"]
    return [
        "**Scale: an MLP on 64 examples, as many hyperparameters as weights, 3 products, float32**",
        _table(head, rows),
    ]


def _overhead(records: list[Record]) -> list[str]:
    timed = ("fixed", "per_product", "seconds")
    rows = [
        [FRAMEWORKS[r["framework"]], METHODS[r["method"]], name, *(_seconds(c[key][1]) for key in timed)]
        for r in records
        for name, c in r["columns"].items()
        if name != STEP
    ]
    head = ["", "method", "", "without products", "per product", f"with {records[0]['count']} products"]
    return ["**Overhead: logistic regression with 100 weights**", _table(head, rows)]


def _compile(records: list[Record]) -> list[str]:
    rows = [
        [r["workload"], METHODS[r["method"]], *(_seconds(c["seconds"][1]) for c in r["columns"].values())]
        for r in records
    ]
    return ["**Tracing and compiling in JAX, 10 products**", _table(["workload", "method", HAND, "ours"], rows)]


def _import(records: list[Record]) -> list[str]:
    rows = [[f"`import {r['what']}`", _seconds(r["seconds"][1])] for r in records]
    return ["**Imports**", _table(["", "time"], rows)]


def _syncs(records: list[Record]) -> list[str]:
    rows = [[r["where"], METHODS[r["method"]], f"{r['per_product']:.3g}", f"{r['fixed']:.3g}"] for r in records]
    return [
        "**Numbers read from the device (host syncs), PyTorch**",
        _table(["", "method", "per product", "else"], rows),
    ]


def _joint(records: list[Record]) -> list[str]:
    memory = {r["column"]: r["bytes"] for r in records if r["kind"] == "joint memory"}
    rows = []
    for r in records:
        for name, c in r.get("columns", {}).items():
            used = _mib(memory[name]) if name in memory else ""
            products = f"{c['products'][1]:.0f}" if "products" in c else ""
            rows.append([name, _seconds(c["seconds"][1]), _spread(c["ratio"]), products, used])
    head = ["10 training steps and an outer step", "time", "/ standard", "products", "peak memory, MiB"]
    weights = next((f"{r['weights']:,}" for r in records if "weights" in r), "?")
    return [
        f"**Joint training beside standard training: an MLP of {weights} weights on digits, batch 256**",
        _table(head, rows),
    ]


def _amortised(records: list[Record]) -> list[str]:
    rows = []
    for r in records:
        for name, c in r["columns"].items():
            there = "never" if c["seconds_to_goal"] is None else _seconds(c["seconds_to_goal"])
            rows.append([r["data"], name, f"{c['plain_steps'][1]:.1f}", f"{c['best_loss']:.4f}", there])
    head = ["data", "per outer step", "plain steps", "best validation loss", "time to the best loss of 20 products"]
    return ["**Amortised outer steps: CG, damping 0.1, 150 outer steps**", _table(head, rows)]


KINDS = {
    ("scale", "scale memory"): _scale,
    ("overhead",): _overhead,
    ("compile",): _compile,
    ("import",): _import,
    ("syncs",): _syncs,
    ("joint", "joint memory"): _joint,
    ("amortised",): _amortised,
}
