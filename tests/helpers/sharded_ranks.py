"""The program of each process in test_sharded.py: `python sharded_ranks.py RANK WORLD FOLDER FUNCTIONS`."""

import os
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_models import F, data, fsdp, make, share, tensor_parallel, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import bilevel as bl
import bilevel_torch
from bilevel_torch import roll_call

CG = bl.CG(damping=4.0, rtol=1e-12)
SOLVERS = {
    "cg": CG,
    "minres": bl.MINRES(damping=4.0, rtol=1e-12),
    "neumann": bl.Neumann(terms=8, damping=4.0),
    "nystrom": bl.Nystrom(rank=4, damping=4.0),
    "identity": bl.Identity(),
}
MODELS = ["convnet", "tied", "checkpointed"]


class Run:
    """A model with its data and hyperparameters, whole or sharded.

    Hyperparameters are a weight for each example, a decay, and a decay for each entry of the parameters.

    Attributes:
        net: the model.
        rows: the rows of the data that this rank has.
        backend: the backend for them.
    """

    def __init__(self, name, shard=None, rows=None):
        net, draw = make(name)
        self.net = net if shard is None else shard(net)
        self.x, self.y, self.x_val, self.y_val = data(draw)
        self.rows = slice(None) if rows is None else rows
        self.weights = torch.zeros(len(self.y), dtype=torch.float64, requires_grad=True)
        self.decay = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        self.decays = [torch.full_like(p, -3.0, requires_grad=True) for p in self.net.parameters()]
        samples = None if rows is None else len(self.y[rows])
        if shard is None:
            self.backend = bilevel_torch.TorchBackend()
        else:
            self.backend = bilevel_torch.Sharded(self.net, inner_samples=samples, outer_samples=samples)

    @property
    def hparams(self):
        return {"weights": self.weights, "decay": self.decay, "decays": self.decays}

    def inner(self):
        penalty = whole(sum((d.exp() * p**2).sum() for d, p in zip(self.decays, self.net.parameters(), strict=True)))
        norm = whole(sum((p**2).sum() for p in self.net.parameters()))
        losses = F.cross_entropy(self.net(self.x[self.rows]), self.y[self.rows], reduction="none")
        return (self.weights.exp()[self.rows] * losses).mean() + penalty + self.decay.exp() * norm

    def outer(self):
        return F.cross_entropy(self.net(self.x_val[self.rows]), self.y_val[self.rows])

    def losses(self):
        context = self.backend.losses() if isinstance(self.backend, bilevel_torch.Sharded) else nullcontext()
        with context:
            return self.inner(), self.outer()

    def hypergradient(self, solver=CG):
        params = dict(self.net.named_parameters())
        return bilevel_torch.hypergradient(
            *self.losses(),
            params,
            self.hparams,
            solver=solver,
            backend=self.backend,
            on_failure="ignore",
        )

    def vectors(self, solver=CG):
        """Return the value, the hypergradient and the adjoint."""
        hg = self.hypergradient(solver)
        return [hg.value, *_leaves(hg.grad), *hg.adjoint.values()]

    def loop(self, solver):
        """Return all tensors after two outer steps, with steps of training between them."""
        tensors = [self.weights, self.decay, *self.decays]
        inner_optimizer = torch.optim.SGD(self.net.parameters(), 0.1)
        outer_optimizer = torch.optim.Adam(tensors, 0.1, foreach=False)
        for _ in range(2):
            for _ in range(2):
                inner_optimizer.zero_grad()
                self.train_loss().backward()
                inner_optimizer.step()
            outer_optimizer.zero_grad()
            bilevel_torch.backward(
                *self.losses(), self.net.parameters(), self.hparams, solver=solver, backend=self.backend
            )
            outer_optimizer.step()
        return [*self.net.parameters(), *tensors, *(t.grad for t in tensors)]

    def train_loss(self):
        """Return a loss whose mean over the ranks is the loss of all data."""
        world = dist.get_world_size() if self.rows != slice(None) else 1
        mine = len(self.y[self.rows]) / len(self.y)
        return F.cross_entropy(self.net(self.x[self.rows]), self.y[self.rows]) * (world * mine)

    def by_functions(self):
        """Return the hypergradient by functions of params and hparams."""
        names = [name for name, _ in self.net.named_parameters()]

        def inner(params, h, x, y):
            penalty = h.exp() * whole(sum((params[name] ** 2).sum() for name in names))
            return F.cross_entropy(torch.func.functional_call(self.net, params, (x,)), y) + penalty

        def outer(params, h, x, y):
            return F.cross_entropy(torch.func.functional_call(self.net, params, (x,)), y)

        params = {name: p.detach() for name, p in self.net.named_parameters()}
        args = [(x[self.rows], y[self.rows]) for x, y in ((self.x, self.y), (self.x_val, self.y_val))]
        hg = bl.hypergradient(
            bl.Problem(inner, outer),
            params,
            torch.tensor(-2.0, dtype=torch.float64),
            inner_args=args[0],
            outer_args=args[1],
            solver=CG,
            backend=self.backend,
        )
        return [hg.value, hg.grad, *hg.adjoint.values()]


def _leaves(grad):
    return [grad["weights"], grad["decay"], *grad["decays"]]


def error(found, expected):
    """Return the largest relative error of some tensors. A tensor of zeros counts relative to one."""
    pairs = [(whole(a.detach()), b.detach()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / (norm if (norm := b.norm()) > 1e-12 else 1)) for a, b in pairs)


def trained(run):
    """Return a run after a forward and a backward pass."""
    run.train_loss().backward()
    run.net.zero_grad()
    return run


def compiled(run):
    """Return a run with compiled layers. Compiled code has no second derivative."""
    for part in run.net:
        part.compile(backend="aot_eager")
    return run


def of_a_replicated_cotangent(run):
    """Return a product with a vector that DTensor operations have replicated, and the product with its sharded form."""
    weight = run.net.get_parameter("0.weight")
    with run.backend.losses():
        loss = (run.net[0].weight ** 3).sum()
        (g,) = torch.autograd.grad(loss, weight, create_graph=True)
    v = torch.distributed.tensor.distribute_tensor(torch.arange(20.0).double().reshape(5, 4), weight.device_mesh)
    forms = [v, v.redistribute(placements=weight.placements)]
    return [[torch.autograd.grad(g, weight, form, retain_graph=True)[0]] for form in forms]


def results(rank, world, mesh):
    """Return the relative error against one process, by case."""
    errors = {}
    mine = share(rank, world)

    def shard(net):
        return fsdp(net, mesh)

    for name, solver in SOLVERS.items():
        errors[name] = error(Run("mlp", shard, mine).vectors(solver), Run("mlp").vectors(solver))
    for name in MODELS:
        errors[name] = error(Run(name, shard, mine).vectors(), Run(name).vectors())
    errors["loop"] = error(Run("mlp", shard, mine).loop(bl.WarmStart(CG)), Run("mlp").loop(bl.WarmStart(CG)))
    errors["functions"] = error(Run("mlp", shard, mine).by_functions(), Run("mlp").by_functions())
    errors["tensor parallel"] = error(
        Run("deep", lambda net: tensor_parallel(net, mesh)).vectors(), Run("deep").vectors()
    )

    def staying(net):
        return fsdp(net, mesh, reshard_after_forward=False)

    errors["staying"] = error(trained(Run("tied", staying, mine)).vectors(), Run("tied").vectors())
    errors["loop of staying"] = error(
        Run("mlp", staying, mine).loop(bl.WarmStart(CG)), Run("mlp").loop(bl.WarmStart(CG))
    )
    errors["compiled"] = error(trained(compiled(Run("mlp", shard, mine))).vectors(), Run("mlp").vectors())
    replicated, sharded = of_a_replicated_cotangent(Run("mlp", shard, mine))
    errors["replicated cotangent"] = error(replicated, [whole(t) for t in sharded])
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float64)
    mixed = Run("mlp", lambda net: fsdp(net, mesh, mp_policy=policy), mine)
    errors["mixed precision"] = error(mixed.vectors(SOLVERS["neumann"]), Run("mlp").vectors(SOLVERS["neumann"]))
    return errors


def meshes(rank, world, mesh):
    """Return the relative error against one process on four ranks, by the kind of the mesh."""
    expected, mine = Run("deep").vectors(), share(rank, world)
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensors"))

    def in_both_ways(net):
        return fsdp(tensor_parallel(net, both["tensors"]), both["data"])

    runs = {
        "four ranks": Run("deep", lambda net: fsdp(net, mesh), mine),
        "replicas": Run("deep", lambda net: fsdp(net, replicas), mine),
        "two dimensions": Run("deep", in_both_ways, share(both["data"].get_local_rank(), 2)),
    }
    return {name: error(run.vectors(), expected) for name, run in runs.items()}


def mishaps(rank, world, mesh):
    """Return the error that this rank gets, by what is wrong."""
    said, mine = {}, share(rank, world)
    last = rank == world - 1

    def attempt(name, call, within=True, spoil=None, change=None):
        run = Run("mlp", lambda net: fsdp(net, mesh), mine)
        if change:
            change(run)
        try:
            inner, outer = run.losses() if within else (run.inner(), run.outer())
            if spoil:
                inner = spoil(run, inner)
            call(run, inner, outer)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    def call(run, inner, outer, solver=CG, backend=None, on_failure="raise"):
        params, backend = run.net.named_parameters(), backend or run.backend
        bilevel_torch.backward(inner, outer, params, run.hparams, solver=solver, backend=backend, on_failure=on_failure)

    def step(run, inner):
        with torch.no_grad():
            next(run.net.parameters()).mul_(2.0)
        return inner

    def without_penalty(run):
        run.inner = run.outer

    def with_penalty(penalty):
        def change(run):
            run.inner = lambda: run.outer() + penalty(run.net)

        return change

    def of_a_part(run):
        run.train_loss()  # FSDP finds the whole module here
        run.backend = bilevel_torch.Sharded(run.net[0])

    def with_power(power):
        def change(run):
            own = run.inner

            def inner():
                zero = (run.net(run.x[mine]) * 0).sum()
                return own() + (zero + (0.0 if last else 1.0)) ** power

            run.inner = inner

        return change

    def other_decay(run):
        run.decay.data.fill_(float(rank))

    def other_counts(run):
        run.backend = bilevel_torch.Sharded(run.net, inner_samples=1 if last else None)

    attempt("outside", call, within=False)
    attempt("outside, no penalty", call, within=False, change=without_penalty)
    attempt("no backend", lambda *args: call(*args, backend=bilevel_torch.TorchBackend()))
    attempt("nan", call, spoil=lambda run, inner: inner * (float("nan") if last else 1.0))
    attempt("nan gradient", call, change=with_power(0.5))
    attempt("nan product", call, change=with_power(1.5))
    attempt("solver", lambda *args: call(*args, solver=bl.CG(damping=4.0 + rank)))
    attempt("decay", call, change=other_decay)
    attempt("counts", call, change=other_counts)
    attempt("mixture", call, change=with_penalty(lambda net: sum((p**2).sum() for p in net.parameters())))
    attempt("parts", call, change=with_penalty(lambda net: sum((p.to_local() ** 2).sum() for p in net.parameters())))
    attempt("part of the module", call, change=of_a_part)
    attempt("exact", lambda *args: call(*args, solver="exact"))
    attempt("changed", call, spoil=step)
    attempt(
        "diagnose",
        lambda run, *_: bilevel_torch.diagnose(
            run.inner, run.outer, list(run.net.parameters()), run.hparams, backend=run.backend
        ),
    )
    return said


def without_a_rank(rank, world, mesh):
    """Return the error of each rank if the last rank dies before the solve."""
    roll_call.PATIENCE = 1.0
    run = Run("mlp", lambda net: fsdp(net, mesh), share(rank, world))
    losses = run.losses()
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        bilevel_torch.backward(*losses, run.net.parameters(), run.hparams, backend=run.backend)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def checkpoint(rank, world, mesh):
    """Save a `WarmStart` of four ranks after two calls. On other ranks, load it, and return the steps of a solve."""
    import torch.distributed.checkpoint as dcp

    run = Run("mlp", lambda net: fsdp(net, mesh), share(rank, world))
    solver, path = bl.WarmStart(CG, extrapolate=True), str(Path(sys.argv[3]) / "checkpoint")
    vectors = ("adjoint", "previous")
    if world == 4:
        run.hypergradient(solver)
        run.hypergradient(solver)
        dcp.save({"solver": solver.state_dict()}, checkpoint_id=path)
    else:
        template = {name: torch.zeros_like(p) for name, p in run.net.named_parameters()}
        state = {"solver": solver.state_dict() | {name: dict(template) for name in vectors}}
        dcp.load(state, checkpoint_id=path)
        solver.load_state_dict(state["solver"])
    found = {name: {key: whole(t) for key, t in getattr(solver, name).items()} for name in vectors}
    return found, run.hypergradient(solver).info.steps


if __name__ == "__main__":
    rank, world, folder, functions = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    mesh = init_device_mesh("cpu", (world,))
    for what in functions:
        torch.save(globals()[what](rank, world, mesh), folder / f"{what}-{world}-{rank}.pt")
    if "without_a_rank" not in functions:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)  # FSDP has kept the group, whose threads may abort the process while the interpreter ends
