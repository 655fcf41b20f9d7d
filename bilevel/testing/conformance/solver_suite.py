"""The conformance suite of solvers."""

from collections.abc import Iterable, Iterator, Mapping

from bilevel.backend import Backend
from bilevel.config import get_backend, get_solver, list_backends
from bilevel.hypergradient import SolverSpec
from bilevel.messages import suggest
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
    """Return the laws of a solver as checks, which can be called one by one.

    In pytest::

        @pytest.mark.parametrize("check", check_solver(MySolver(), solves=["definite"]), ids=str)
        def test_my_solver(check):
            check()

    The checks solve small systems with known spectra. The largest eigenvalue is 4 (with the solver's damping). They run
    on every installed backend, compiled if the framework compiles. On systems outside of ``solves``, the solver may
    fail, but its status must report the failure.

    Args:
        solver: a `bl.LinearSolver`, a `bilevel.methods.Method`, or an argument of `bl.get_solver`. If it is a frozen
            dataclass, the suite varies its options ``maxiter``, ``damping`` and ``rtol``.
        solves: the classes of systems on which the solver converges: "definite" (eigenvalues from 1 to 4),
            "ill_conditioned" (from 4e-4 to 4), "indefinite", "singular" (with a solution) and "nonsymmetric". On other
            systems, the solver must not return CONVERGED with a wrong answer. A `Method` has only "definite" and
            "indefinite".
        rtol: the bound of ``norm(b - A v) / norm(b)`` for CONVERGED, up to a factor of 10 and the precision of the
            dtype. Default: the solver's ``rtol``, or √eps if it has none or 0.
        truncated: whether CONVERGED implies no such bound on systems outside of ``solves``, as for a method with a
            fixed number of terms. Then ``residual_norm`` must be a bound or nan.
        warm_start: whether the solver uses a warm start. A direct solver need not use it.
        backends: a backend, by name or object, or several; None: all installed backends.
        excused: reasons by the names of checks, as in ``{"overrun": "..."}`` or ``{"overrun-torch": "..."}``. An
            excused check is skipped with the reason if it fails, and raises an error if it passes.

    Returns:
        A list of `Check`, each with a ``name`` and a ``law``. A failed check raises an AssertionError with the system,
        the expected and the actual result.

    Raises:
        TypeError, ValueError: for an invalid solver, and for unknown classes, backends and excused names.

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
