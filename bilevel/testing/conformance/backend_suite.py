"""The conformance suite of backends."""

from collections.abc import Iterator, Mapping

from bilevel.backend import Backend
from bilevel.config import get_backend
from bilevel.linearization import Inputs
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import H, P
from bilevel.testing.conformance import arrays, control, derivatives, optional, vectors
from bilevel.testing.conformance.checks import Applied, Check, Law, collect, known_backends
from bilevel.testing.conformance.framework import Framework
from bilevel.testing.conformance.subject import widest
from bilevel.validation import check_inputs


def check_backend(
    backend: Backend | str,
    problem: BilevelProblem | None = None,
    params: P | None = None,
    hparams: H | None = None,
    *,
    inner_args: tuple[object, ...] = (),
    outer_args: tuple[object, ...] = (),
    excused: Mapping[str, str] | None = None,
) -> list[Check]:
    """Return the laws of a backend as checks, to be called one by one.

    In pytest::

        @pytest.mark.parametrize("check", check_backend(backend), ids=str)
        def test_my_backend(check):
            check()

    They concern its arrays and trees, its vectors and loops (`bilevel.spaces.space.Space`), its derivatives
    (against closed forms and differences), and a whole hypergradient by the library's solvers. Their problems are
    functions of arrays with ``@``, ``+``, ``-``, ``*``, ``/``, ``.T`` and ``.sum()``, and bring analytic derivatives,
    for backends that need them.

    Args:
        backend: a backend (`bilevel.backend.Backend`), or its name.
        problem, params, hparams, inner_args, outer_args: a problem at a point, as in `bl.hypergradient`, whose
            derivatives are compared with differences; None: one of the suite's own.
        excused: reasons, by the names of checks, as in ``{"inner_cut_off": "..."}``: such a check is skipped
            with the reason where it fails, and an error where it does not.

    Returns:
        A list of `Check`: each has a ``name`` and a ``law``, and raises an AssertionError that says what was
        expected and what was got.

    Raises:
        TypeError, ValueError: for what is no backend, a point that does not fit, or unknown excused names.

    >>> checks = {check.name: check for check in check_backend("numpy")}
    >>> checks["axpy-numpy-float32"].law
    'alpha x + y keeps the dtypes, whether alpha is a Python number or a scalar of the framework.'
    >>> checks["axpy-numpy-float32"]()
    """
    found = get_backend(backend)
    inputs = None if problem is None else Inputs(params, hparams, inner_args, outer_args)
    if inputs is not None:
        check_inputs(found, *inputs)
    wide = Framework(found, widest(found), problem, inputs)
    dtypes = {wide.dtype: wide, "float32": Framework(found, "float32", problem, inputs)}
    groups = (arrays, vectors, control, derivatives, optional)

    def applied() -> Iterator[Applied]:
        for group in groups:
            for law in group.LAWS:
                if _applies(law, wide):
                    yield Applied(law, wide, (found.name,))
            for dtype, framework in dtypes.items():
                for law in group.PER_DTYPE:
                    yield Applied(law, framework, (found.name, dtype))

    laws = [law for group in groups for law in (*group.LAWS, *group.PER_DTYPE)]
    return collect(applied(), excused, laws, known_backends([found]))


def _applies(law: Law, f: Framework) -> bool:
    if law is vectors.dot_of_half_precision:
        return hasattr(f.backend.space(f.array(1.0)).xp, "bfloat16")
    if law is vectors.mixed_precision:
        return f.dtype == "float64"
    return law not in optional.LAWS or law in optional.derived_by(f.backend)
