"""The conformance suite of solvers."""

from collections.abc import Iterable, Iterator, Mapping

from bilevel.backend import Backend
from bilevel.config import get_backend, get_solver, list_backends
from bilevel.errors import suggest
from bilevel.hypergradient import SolverSpec
from bilevel.methods import Method
from bilevel.testing.conformance import capabilities, execution, linear, methods, rounding
from bilevel.testing.conformance.checks import Applied, Check, collect, known_backends
from bilevel.testing.conformance.subject import Subject, widest
from bilevel.testing.conformance.systems import CLASSES


def check_solver(
    solver: SolverSpec,
    *,
    solves: Iterable[str] = ("definite",),
    rtol: float | None = None,
    truncated: bool = False,
    warm_start: bool = True,
    backends: Backend | str | Iterable[Backend | str] | None = None,
    excused: Mapping[str, str] | None = None,
) -> list[Check]:
    """Return the laws of a solver as checks, to be called one by one.

    In pytest::

        @pytest.mark.parametrize("check", check_solver(MySolver(), solves=["definite"]), ids=str)
        def test_my_solver(check):
            check()

    Each is run on small systems with known spectra, the largest eigenvalue 4 (with the solver's damping), on every
    installed backend, and compiled where the framework compiles. What is not promised may fail, but must say so.

    Args:
        solver: a `bl.LinearSolver`, a `bilevel.methods.Method`, or what `bl.get_solver` takes. To vary its options, the
            suite takes those of a frozen dataclass: ``maxiter``, ``damping`` and ``rtol`` if there are such.
        solves: the classes of systems on which it promises to converge: "definite" (eigenvalues from 1 to 4),
            "ill_conditioned" (from 4e-4 to 4), "indefinite", "singular" (with a solution) and "nonsymmetric". On the
            others, it must not claim CONVERGED with a wrong answer. For a `Method`, the first and
            the third.
        rtol: what CONVERGED promises of ``norm(b - A v) / norm(b)``, to a factor of 10 and what the dtype can.
            Default: the solver's own ``rtol``, or √eps if it has none or 0.
        truncated: whether CONVERGED claims no such thing on systems that are not promised, as of a method with a fixed
            number of terms: then ``residual_norm`` is held to be a bound, or nan.
        warm_start: whether it uses a warm start; a direct method need not.
        backends: a backend, by name or object, or several; None: all that are installed.
        excused: reasons, by the names of checks, as in ``{"overrun": "..."}`` or ``{"overrun-torch": "..."}``: such
            a check is skipped with the reason where it fails, and an error where it does not.

    Returns:
        A list of `Check`: each has a ``name`` and a ``law``, and raises an AssertionError that says on what
        system what was expected and what was got.

    Raises:
        TypeError, ValueError: for what is no solver, and for unknown classes, backends and excused names.

    >>> import bilevel as bl
    >>> checks = check_solver(bl.CG(), solves=["definite", "ill_conditioned"], backends="numpy")
    >>> for check in checks:
    ...     check()
    >>> checks[0].name, checks[0].law[:34]
    ('definite-numpy-float64', 'Well-conditioned positive definite')
    """
    solver = get_solver(solver)
    kinds = [solves] if isinstance(solves, str) else list(solves)
    for kind in kinds:
        if kind not in CLASSES:
            raise ValueError(f"solves: there is no class {kind!r}." + suggest(kind, CLASSES))
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol: expected a number >= 0, got {rtol!r}.")
    if backends is None:
        backends = list_backends()
    elif isinstance(backends, str | Backend):
        backends = [backends]
    found = [get_backend(backend) for backend in backends]
    is_method = isinstance(solver, Method)

    def applied() -> Iterator[Applied]:
        for backend in found:
            at = Subject(solver, backend, widest(backend), frozenset(kinds), rtol, truncated, warm_start)
            single = at.with_dtype("float32")
            for subject in {at.dtype: at, "float32": single}.values():
                for law in (methods if is_method else linear).PER_DTYPE:
                    yield Applied(law, subject, (backend.name, subject.dtype))
            if is_method:
                laws = [*methods.LAWS, *methods.laws_on(backend)]
            else:
                laws = [*linear.LAWS, *capabilities.laws_of(at), *execution.laws_on(backend), *rounding.laws_on(at)]
            for law in laws:
                yield Applied(law, single if law in [*linear.IN_FLOAT32, *rounding.ALL] else at, (backend.name,))

    every = [*linear.PER_DTYPE, *linear.LAWS, *capabilities.ALL, *execution.ALL, *rounding.ALL]
    if is_method:
        every = [*methods.PER_DTYPE, *methods.ALL]
    return collect(applied(), excused, every, known_backends(found))
