"""The torch backend with compiled Hessian-vector products."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from typing_extensions import override

from bilevel.batch_sums import linearized, over_micro_batches
from bilevel.linearization import Dependence, LinearizedMap
from bilevel.spaces.array import Args, H, P
from bilevel.spaces.tree import leaves, leaves_with_paths, with_leaves
from bilevel_torch.autograd import callers_autocast, evaluate, scalar
from bilevel_torch.backend import TorchBackend
from bilevel_torch.compiled.capture import Graphs, capture
from bilevel_torch.isolation import random_states, set_random_states

PROGRAMS = 8  # at most. One takes up to minutes to compile


@dataclass(frozen=True)
class Program:
    """The compiled products of one objective, for tensors of the same shapes.

    Attributes:
        objective: the objective.
        key: the structure of its arguments, with shapes, dtypes and other values.
        modes: the modules that run inside, and whether each is in train mode.
        graphs: the captured parts.
        product: the compiled product.
        dependence: on which leaves L and its gradient depend.
    """

    objective: Callable[..., object]
    key: object
    modes: dict[torch.nn.Module, bool]
    graphs: Graphs
    product: Callable[..., Sequence[torch.Tensor]]
    dependence: Dependence

    def fits(self, objective: object, key: object) -> bool:
        """Return whether the program is for these arguments."""
        same = self.objective == objective and self.key == key
        return same and all(module.training == training for module, training in self.modes.items())


class Compiled(TorchBackend):
    """The torch backend, with Hessian-vector products that `torch.compile` has compiled.

    Make it once, and pass it as ``backend=`` in each call:

        backend = bilevel_torch.Compiled()
        bl.hypergradient(problem, params, hparams, inner_args=(x, y), backend=backend)

    The first call captures the operations of the inner objective and compiles a product. This takes seconds to
    minutes. Later calls with tensors of the same shapes take no more compilation: w, λ and data are inputs of the
    compiled code. Compiling pays where the same problem takes many products.

    The inner objective must be a pure function of its arguments. A number that it reads from elsewhere keeps its value
    from the first call, as in JAX. All tensors must be arguments: data in ``inner_args``, and the buffers of a module
    too. Dropout masks are drawn once per call. All other derivatives run as in `TorchBackend`.

    The first call also computes the gradient and the products without compilation, and compares them.

    Args:
        compiler: a ``backend`` of `torch.compile`.

    Raises:
        RuntimeError: when called, if the objective cannot be captured, if compiled products differ from the products of
            `TorchBackend`, or after 8 compilations: then an objective, a shape or a number changes at each call.
        TypeError: when called with losses in place of functions.
    """

    def __init__(self, compiler: str | Callable[..., Any] = "inductor") -> None:
        super().__init__()
        self.compiler = compiler
        self._programs: list[Program] = []

    @property
    @override
    def by_rows(self) -> TorchBackend:
        return TorchBackend(check_every=1)  # one row after the other: compiled code cannot run inside of vmap

    @override
    @over_micro_batches(linearized)
    def inner(self, objective: Callable[..., object], params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        described = [_described(path, leaf) for path, leaf in leaves_with_paths((params, hparams, args))]
        key = described, callers_autocast()
        program = next((p for p in self._programs if p.fits(objective, key)), None)
        if program is None:
            if len(self._programs) == PROGRAMS:
                raise RuntimeError(
                    f"Compiled: {PROGRAMS} programs are compiled, and the inner objective or its arguments have "
                    "changed again. Define the objective once, outside of the loop. Keep the shapes of the data "
                    "(drop_last=True), and pass numbers that change as tensors."
                )
            program = self._compile(objective, key, params, hparams, args)
            self._programs.append(program)
        return _linearize(program.graphs, program.product, program.dependence, params, hparams, args)

    @override
    def inner_of(self, value: object, params: P, hparams: H, *args: Any, **options: Any) -> LinearizedMap[P, H]:
        raise TypeError(
            "Compiled: the inner loss is computed already, so its operations cannot be compiled. Pass functions to "
            "bl.hypergradient: bl.Problem(inner, outer)."
        )

    def _compile(
        self, objective: Callable[..., object], key: object, params: object, hparams: object, args: Args
    ) -> Program:
        random = random_states()
        with _modules_called() as modes:
            expected = EAGER.inner(objective, params, hparams, args)
        repeats = all(map(torch.equal, random, random_states()))
        set_random_states(random)
        vector = expected.residual
        products = vector, expected.vjp_params(vector), expected.vjp_hparams(vector)
        used = expected.dependence
        assert used is not None
        graphs = capture(_of_lists(objective, params, hparams, args), *_tensors(params, hparams, args))
        product = torch.compile(graphs.product, backend=self.compiler, fullgraph=True, dynamic=False)
        found = _linearize(graphs, product, used(), params, hparams, args)
        results = found.residual, found.vjp_params(vector), found.vjp_hparams(vector)
        set_random_states(random)
        if repeats:  # without dropout
            check_equal(products, results, callers_autocast())
        return Program(objective, key, modes, graphs, product, used())


EAGER = TorchBackend()


def _linearize(
    graphs: Graphs,
    product: Callable[..., Sequence[torch.Tensor]],
    used: Dependence,
    params: P,
    hparams: H,
    args: Args,
) -> LinearizedMap[P, H]:
    weights, hypers, data = _tensors(params, hparams, args)
    found = graphs.gradient(*weights, *hypers, *data)
    residual, saved = found[: len(weights)], found[len(weights) :]

    def vjp_params(v: P) -> P:
        vector = [t.contiguous() for t in leaves(v)]  # another layout would be compiled again
        return with_leaves(params, product(*saved, *vector))

    def vjp_hparams(v: P) -> H | None:
        return with_leaves(hparams, graphs.cross(*saved, *leaves(v))) if any(used.hparams) else None

    return LinearizedMap(with_leaves(params, residual), vjp_params, vjp_hparams, dependence=lambda: used)


def _tensors(*trees: object) -> list[list[torch.Tensor]]:
    return [[leaf.detach() for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in trees]


def _of_lists(objective: Callable[..., object], params: Any, hparams: Any, args: Args) -> Callable[..., torch.Tensor]:
    """Return the objective as a function of the lists of the tensors of its arguments."""

    def loss(w: Sequence[Any], h: Sequence[Any], data: Sequence[Any]) -> torch.Tensor:
        supply = iter(data)
        filled = [next(supply) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves(args)]
        value = evaluate(objective, with_leaves(params, w), with_leaves(hparams, h), *with_leaves(args, filled))
        return scalar("inner", value)

    return loss


def _described(path: str, leaf: object) -> object:
    """Return what a compiled program depends on: the layout of a tensor, or another value itself."""
    if isinstance(leaf, torch.Tensor):
        return path, leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"Compiled: an argument of type {type(leaf).__name__} cannot be compared with the next call's. "
            "Pass tensors, numbers and strings."
        ) from None
    return path, leaf


@contextmanager
def _modules_called() -> Iterator[dict[torch.nn.Module, bool]]:
    """Yield the modules that are called in this block, and whether each is in train mode."""
    modes: dict[torch.nn.Module, bool] = {}
    hook = register_module_forward_pre_hook(lambda module, _: modes.update({module: module.training}))
    try:
        yield modes
    finally:
        hook.remove()


def check_equal(expected: Sequence[Any], found: Sequence[Any], autocast: Sequence[tuple[str, torch.dtype]]) -> None:
    """Raise a RuntimeError unless compiled derivatives equal autograd's, to half of the digits."""
    for name, right, own in zip(("gradient", "Hessian-vector product", "cross product"), expected, found, strict=True):
        if right is None:
            continue
        space = EAGER.space(right)  # all leaves together: a leaf that is zero is only rounding errors
        size, difference = (float(space.max_abs(x)) for x in (right, space.subtract(right, own)))
        eps = max([space.eps, *(torch.finfo(dtype).eps for _, dtype in autocast)])
        if difference > eps**0.5 * size:  # nan is no difference: a status reports it
            raise RuntimeError(
                f"Compiled: the compiled {name} differs from autograd's by {difference:.1e} in an entry, and the "
                f"largest entry is {size:.1e}. Is the inner objective a pure function of its arguments? If it is, "
                "leave out Compiled."
            )
