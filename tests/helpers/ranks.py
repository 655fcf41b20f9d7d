"""The program of each process in test_data_parallel.py: `python ranks.py RANK WORLD FOLDER`."""

import os
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bilevel as bl
import bilevel_torch
from bilevel_torch.space import TorchSpace

F = nn.functional
SAMPLES, SHARES = 24, {1: [24], 2: [5, 19], 3: [7, 1, 16]}  # of the training data, uneven
SOLVERS = {
    "cg": bl.CG(damping=1.0, rtol=1e-12),
    "minres": bl.MINRES(damping=1.0, rtol=1e-12),
    "gmres": bl.GMRES(damping=1.0, rtol=1e-12, restart=40),
    "neumann": bl.Neumann(terms=60, damping=1.0),
    "exact": bl.Exact(damping=1.0),
    "preconditioned": bl.CG(damping=1.0, rtol=1e-12, preconditioner=bl.NystromPreconditioner(rank=8)),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def shard(rank, world):
    """This rank's training data, its place in all of them, and its validation data, of another unevenness."""
    generator = torch.Generator().manual_seed(1)
    x, x_val = torch.randn(2, SAMPLES, 4, generator=generator, dtype=torch.float64)
    y, y_val = torch.randint(3, (2, SAMPLES), generator=generator)
    start = sum(SHARES[world][:rank])
    mine = slice(start, start + SHARES[world][rank])
    val = slice(rank, None, world)
    return (x[mine], y[mine], mine), (x_val[val], y_val[val])


def backend_for(train, val, world):
    if world == 1:
        return bilevel_torch.TorchBackend()
    return bilevel_torch.DataParallel(inner_samples=len(train[1]), outer_samples=len(val[1]))


def loop(net, run, train, val, backend, solver, steps=2):
    """A few steps of training and tuning, with a weight for each example and a decay for each tensor."""
    (x, y, mine), (x_val, y_val) = train, val
    weights = torch.zeros(SAMPLES, dtype=torch.float64, requires_grad=True)
    decays = [torch.tensor(-3.0, dtype=torch.float64, requires_grad=True) for _ in net.parameters()]
    inner_optimizer, outer_optimizer = (
        torch.optim.Adam(net.parameters(), 0.05),
        torch.optim.Adam([weights, *decays], 0.1),
    )

    def loss(module):
        penalty = sum((d.exp() * p**2).sum() for d, p in zip(decays, net.parameters(), strict=True))
        return (weights[mine].exp() * F.cross_entropy(module(x), y, reduction="none")).mean() + penalty

    for _ in range(steps):
        for _ in range(3):
            inner_optimizer.zero_grad()
            # DDP divides by the number of ranks, not of samples.
            (loss(run) * (len(y) / SAMPLES * (dist.get_world_size() if run is not net else 1))).backward()
            inner_optimizer.step()
        outer_optimizer.zero_grad()
        bilevel_torch.backward(
            loss(net),
            F.cross_entropy(net(x_val), y_val),
            net.parameters(),
            {"decays": decays, "weights": weights},
            solver=solver,
            backend=backend,
        )
        outer_optimizer.step()
    return [*net.parameters(), weights, *decays, weights.grad, *(d.grad for d in decays)]


def with_functions(net, train, val, backend, solver, from_model=False, size=None):
    """The same by functions of params and hparams, as finite differences, unrolling and Gauss-Newton need them."""

    def call(params, x):
        return torch.func.functional_call(net, params, (x,))

    def penalty(params, log_decay):
        return log_decay.exp() * sum((p**2).sum() for p in params.values())

    def outer(params, log_decay, x, y):
        return F.cross_entropy(call(params, x), y)

    if from_model:
        problem = bl.Problem.from_model(lambda w, h, x: call(w, x), F.cross_entropy, outer, penalty=penalty)
    else:
        problem = bl.Problem(lambda w, h, x, y: F.cross_entropy(call(w, x), y) + penalty(w, h), outer)
    params = {name: p.detach() for name, p in net.named_parameters()}
    log_decay = torch.tensor(-2.0, dtype=torch.float64)
    args = train[:2], val
    if size:
        args = [bl.MicroBatches(arrays, size=size) for arrays in args]
    hg = bl.hypergradient(
        problem, params, log_decay, inner_args=args[0], outer_args=args[1], solver=solver, backend=backend
    )
    return [hg.grad, hg.value, *hg.adjoint.values()]


def influence_of_one(net, train, val, backend, rank, world):
    """Hyperparameters that only the last rank's loss knows of."""
    h = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (x, y, mine), (x_val, y_val) = train, val
    weights = torch.ones(SAMPLES, dtype=torch.float64)
    weights = torch.cat([weights[:-1], h[None]]) if rank == world - 1 else weights
    inner = (weights[mine] * F.cross_entropy(net(x), y, reduction="none")).mean()
    inner = inner + 0.1 * sum((p**2).sum() for p in net.parameters())
    outer = F.cross_entropy(net(x_val), y_val)
    solver = bl.MINRES(damping=1.0, rtol=1e-12)
    return [bilevel_torch.hypergradient(inner, outer, net.parameters(), h, solver=solver, backend=backend).grad]


@contextmanager
def odd_machine(rank):
    """Let all ranks but the first compute the numbers that steer a solver otherwise, as another kind of machine may."""
    methods = {name: getattr(TorchSpace, name) for name in ("dot", "stack_dot", "max_abs", "numpy_callback")}
    for name, method in methods.items():
        setattr(TorchSpace, name, lambda *args, method=method: method(*args) * (1 + 1e-3 * rank))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(TorchSpace, name, method)


@contextmanager
def gathered(net):
    """Hold whole parameters, as plain tensors, on every rank."""
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in net.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not net, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
            part.reshard()


def sharded(net, train, val, backend, world):
    """A few steps of training by fully_shard, with parameters that are gathered for each hypergradient."""
    from torch.distributed.fsdp import fully_shard

    if world > 1:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        for part in (net[0], net[2], net):
            fully_shard(part, mesh=mesh)
    (x, y, _), (x_val, y_val) = train, val
    decay = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    inner_optimizer, outer_optimizer = torch.optim.Adam(net.parameters(), 0.05), torch.optim.Adam([decay], 0.1)
    for _ in range(2):
        for _ in range(3):
            inner_optimizer.zero_grad()
            (F.cross_entropy(net(x), y) * (len(y) / SAMPLES * world)).backward()
            inner_optimizer.step()
        outer_optimizer.zero_grad()
        with gathered(net):
            inner = F.cross_entropy(net(x), y) + decay.exp() * sum((p**2).sum() for p in net.parameters())
            outer = F.cross_entropy(net(x_val), y_val)
            bilevel_torch.backward(inner, outer, net.parameters(), decay, solver=SOLVERS["cg"], backend=backend)
        outer_optimizer.step()
    whole = [p if world == 1 else p.full_tensor() for p in net.parameters()]  # which only a DTensor has
    return [*whole, decay, decay.grad]


def compute(rank, world):
    """All results, by name."""
    net, (train, val) = model(), shard(rank, world)
    results = {}
    for name, solver in SOLVERS.items():
        net = model()
        run = net if world == 1 else DistributedDataParallel(net)
        results[name] = loop(net, run, train, val, backend_for(train, val, world), bl.WarmStart(solver))
    for name, solver in (
        ("unrolled", bl.Unrolled(steps=5, step_size=0.1)),
        ("forward", bl.Unrolled(steps=5, step_size=0.1, mode="forward")),
    ):
        results[name] = with_functions(net, train, val, backend_for(train, val, world), solver)
    gauss_newton = with_functions(net, train, val, backend_for(train, val, world), SOLVERS["cg"], from_model=True)
    results["gauss-newton"] = gauss_newton
    size = None if world == 1 else 3  # so ranks have different numbers of micro-batches
    backend = backend_for(train, val, world)
    results["micro-batches"] = with_functions(net, train, val, backend, SOLVERS["cg"], size=size)
    results["one rank's"] = influence_of_one(net, train, val, backend_for(train, val, world), rank, world)
    with odd_machine(rank):
        results["an odd machine"] = [
            tensor
            for solver in SOLVERS.values()
            for tensor in with_functions(net, train, val, backend_for(train, val, world), solver)
        ]
    results["fully_shard"] = sharded(model(), train, val, backend_for(train, val, world), world)
    return {name: [t.detach() for t in tensors] for name, tensors in results.items()}


def ddp_options(rank, world):
    """Return relative errors after training with join(), no_sync() and a parameter that the network does not use.

    The errors are of the hypergradient and adjoint, and of the gradients that are accumulated around the call.
    """
    net, ((x, y, _), val), (whole, whole_val) = model(), shard(rank, world), shard(0, 1)
    net.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    run, optimizer = DistributedDataParallel(net, find_unused_parameters=True), torch.optim.SGD(net.parameters(), 0.1)
    with run.join():  # ranks have different numbers of batches, and the last one may be small
        for start in range(0, len(y), 4):
            optimizer.zero_grad()
            F.cross_entropy(run(x[start : start + 4]), y[start : start + 4]).backward()
            optimizer.step()
    h = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)

    def hypergradient(train, val, backend):
        inner = F.cross_entropy(net(train[0]), train[1]) + h.exp() * sum((p**2).sum() for p in net.parameters())
        outer, params = F.cross_entropy(net(val[0]), val[1]), list(net.parameters())
        hg = bilevel_torch.hypergradient(inner, outer, params, h, solver=SOLVERS["cg"], backend=backend)
        return torch.cat([hg.grad.reshape(1), *(t.reshape(-1) for t in hg.adjoint)])

    used = list(net.parameters())[1:]  # "unused" is the first
    optimizer.zero_grad()
    with run.no_sync():
        F.cross_entropy(run(x[:1]), y[:1]).backward()
    found = hypergradient((x, y), val, backend_for((x, y), val, world))
    F.cross_entropy(run(x[-1:]), y[-1:]).backward()
    grads = torch.cat([p.grad.reshape(-1) for p in used])
    own = torch.autograd.grad(F.cross_entropy(net(x[:1]), y[:1]) + F.cross_entropy(net(x[-1:]), y[-1:]), used)
    mean = torch.cat([g.reshape(-1) for g in own]) / world
    dist.all_reduce(mean)
    expected = hypergradient(whole[:2], whole_val, bilevel_torch.TorchBackend())
    return [float((a - b).norm() / b.norm()) for a, b in ((found, expected), (grads, mean))]


def mishaps(rank, world):
    """What each rank is told when something is wrong on one of them."""
    net, (train, val) = model(), shard(rank, world)
    said, backend = {}, backend_for(train, val, world)

    def attempt(name, spoil, backend=backend, value=0.3, **options):
        h = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        penalty = h.exp().mean() * sum((p**2).sum() for p in net.parameters())
        inner = F.cross_entropy(net(train[0]), train[1]) + penalty
        outer = F.cross_entropy(net(val[0]), val[1])
        inner, outer = spoil(inner, outer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                bilevel_torch.backward(
                    inner, outer, net.parameters(), h, backend=backend, on_failure="raise", **options
                )
        except (bl.SolverError, ValueError, UserWarning) as error:
            said[name] = f"{type(error).__name__}: {error}"

    last = rank == world - 1
    attempt("nan", lambda inner, outer: (inner * (float("nan") if last else 1.0), outer))
    attempt("nan gradient", lambda inner, outer: (inner + ((inner - inner).sqrt() if last else 0.0), outer))
    attempt("solver", lambda *both: both, solver=bl.CG(damping=3.0 if last else 2.0))
    attempt("maxiter", lambda *both: both, solver=bl.CG(maxiter=1, damping=1.0))
    attempt("fine", lambda *both: both, solver=bl.CG(damping=2.0))
    some = bilevel_torch.DataParallel(inner_samples=len(train[1]) if last else None)
    attempt("given on some", lambda *both: both, backend=some)
    attempt("unequal", lambda *both: both, value=float(rank))
    attempt("own weights", lambda *both: both, value=[0.0] * len(train[1]))
    net[0].bias.requires_grad_(rank > 0)
    attempt("frozen on one", lambda *both: both)
    net[0].bias.requires_grad_(True)
    group = dist.new_group(range(1, world))
    try:
        attempt(
            "in a group", lambda *both: both, backend=bilevel_torch.DataParallel(group=group), solver=bl.CG(damping=2.0)
        )
    except ValueError as error:
        said["not in the group"] = str(error)
    attempt("alone", lambda *both: both, backend=None)
    attempt("alone on purpose", lambda *both: both, backend=bilevel_torch.TorchBackend(), solver=bl.CG(damping=2.0))
    return said


def raised_on_one(rank, world):
    """Return the error of each rank if the last rank raises one in a product."""
    net, (train, val) = model(), shard(rank, world)
    outputs, h = net(train[0]), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def raise_error(_):
        raise MemoryError("no memory, in a test")

    if rank == world - 1:
        outputs.register_hook(raise_error)
    inner = F.cross_entropy(outputs, train[1]) + h * sum((p**2).sum() for p in net.parameters())
    outer, backend = F.cross_entropy(net(val[0]), val[1]), backend_for(train, val, world)
    try:
        bilevel_torch.backward(inner, outer, net.parameters(), h, backend=backend)
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found = {"results": compute(rank, world), "said": mishaps(rank, world)}
    found["ddp options"] = ddp_options(rank, world)
    torch.save(found | {"raised": raised_on_one(rank, world)}, folder / f"{rank}.pt")  # the group is useless now
    os._exit(0)  # FSDP has kept the group, whose threads may abort the process while the interpreter ends
