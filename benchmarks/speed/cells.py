"""Time and memory of a workload, a method and a number of products, in either framework."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.speed import sizes
from benchmarks.speed.measure import compare, peak_memory

Calls = dict[str, Callable[[], Any]]
OURS, HAND, STEP = "ours", "hand-written", "plain step"
UNROLLED_STEPS = 20
PEERS_AT_MOST = 10  # products; beyond, only where the workload says so


def size_of(spec: dict[str, Any]) -> sizes.Size:
    """Return the size that a job asks for: of its name, or of a number of million weights."""
    if "millions" in spec:
        return sizes.scaled(spec["millions"])
    return (sizes.QUICK if spec["quick"] else sizes.FULL)[spec["workload"]]


def times(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a record for each method and number of products of a workload."""
    w = _workload(spec)
    for method, count in spec["cells"]:
        calls = _calls(spec["framework"], w, method, count)
        if "columns" in spec:
            calls = {name: call for name, call in calls.items() if name in spec["columns"]}
        elif method != "unrolled" and count > PEERS_AT_MOST and not spec["peers_always"]:
            calls = {name: call for name, call in calls.items() if name in (STEP, OURS) or name.startswith(HAND)}
        result = compare(calls, OURS, HAND, (STEP,), spec["budget"], least=1 if spec["quick"] else 3)
        yield _about(spec, w, method, count) | {"kind": spec["job"], "columns": result}


def memory(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the peak memory of one column, in a separate process."""
    w = _workload(spec)
    (method, count), column = spec["cells"][0], spec["column"]
    record = _about(spec, w, method, count) | {"kind": spec["job"], "column": column}
    try:
        prepare, call = (_to_compile if spec["framework"] == "jax" else _to_warm_up)(w, method, count, column)
        yield record | {"bytes": peak_memory(prepare, call, spec["device"])}
    except KeyError:
        return  # a peer that is not installed
    except Exception as error:
        if column in (OURS, HAND):
            raise
        yield record | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _workload(spec: dict[str, Any]) -> Any:
    name, size = spec["workload"], size_of(spec)
    if spec["framework"] == "torch":
        from benchmarks.speed.torch_workloads import workload

        return workload(name, size, spec["device"])
    from benchmarks.speed.jax_workloads import workload

    return workload(name, size)


def _calls(framework: str, w: Any, method: str, count: int) -> Calls:
    if framework == "torch":
        from benchmarks.speed.torch_columns import columns
        from benchmarks.speed.torch_peers import peers

        return columns(w, method, count) | peers(w, method, count)
    from benchmarks.speed.jax_columns import columns, functions
    from benchmarks.speed.jax_peers import peers

    return columns(functions(w, method, count) | peers(w, method, count), w)


def _to_warm_up(w: Any, method: str, count: int, column: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return what starts PyTorch's threads without leaving a tensor, and the call of a column."""
    from torch.autograd import grad

    return lambda: grad(w.inner_loss(), w.params), _calls("torch", w, method, count)[column]


def _to_compile(w: Any, method: str, count: int, column: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return what starts JAX's threads, and the call of a column that is compiled but has not run."""
    import jax

    from benchmarks.speed.jax_columns import functions, plain_step, ready
    from benchmarks.speed.jax_peers import peers

    step, point = partial(plain_step, w), (w.params, w.log_decays, w.train)
    if column == STEP:
        return lambda: None, ready(jax.jit(step).lower(*point).compile(), *point)
    function = (functions(w, method, count) | peers(w, method, count))[column]
    return ready(jax.jit(w.inner), *point), ready(jax.jit(function).lower(*w.point).compile(), *w.point)


def _about(spec: dict[str, Any], w: Any, method: str, count: int) -> dict[str, Any]:
    if spec["framework"] == "torch":
        weights = sum(p.numel() for p in w.params)
    else:
        weights = sum(p.size for p in w.params.values())
    return {
        "framework": spec["framework"], "workload": spec["workload"], "method": method, "count": count,
        "weights": weights,
    }  # fmt: skip
