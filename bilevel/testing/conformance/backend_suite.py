"""The conformance suite of backends."""

from collections.abc import Iterator, Mapping

from bilevel.backend import Backend
from bilevel.config import get_backend
from bilevel.linearization import Inputs
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Args
from bilevel.testing.conformance import arrays, control, derivatives, optional, vectors
from bilevel.testing.conformance.checks import Applied, Check, Law, collect, known_backends
from bilevel.testing.conformance.framework import Framework
from bilevel.testing.conformance.subject import widest
from bilevel.validation import check_inputs


def check_backend(
    backend: Backend | str,
    problem: BilevelProblem | None = None,
    params: object | None = None,
    hparams: object | None = None,
    *,
    inner_args: Args = (),
    outer_args: Args = (),
    excused: Mapping[str, str] | None = None,
) -> list[Check]:
    """Return the laws of a backend as checks, which can be called one by one.

    In pytest::

        @pytest.mark.parametrize("check", check_backend(backend), ids=str)
        def test_my_backend(check):
            check()

    The laws cover arrays and trees, vectors and loops (`bilevel.spaces.space.Space`), derivatives (against closed forms
    and differences), and whole hypergradients by the library's solvers. The suite's problems use only ``@``, ``+``,
    ``-``, ``*``, ``/``, ``.T`` and ``.sum()``, and have analytic derivatives for backends that need them.

    Args:
        backend: a backend (`bilevel.backend.Backend`), or its name.
        problem, params, hparams, inner_args, outer_args: a problem at a point, as in `bl.hypergradient`. Its
            derivatives are compared with differences. None: a problem of the suite.
        excused: reasons by the names of checks, as in ``{"inner_cut_off": "..."}``. An excused check is skipped with
            the reason if it fails, and raises an error if it passes.

    Returns:
        A list of `Check`, each with a ``name`` and a ``law``. A failed check raises an AssertionError with the expected
        and the actual result.

    Raises:
        TypeError, ValueError: for an invalid backend, an invalid point, or unknown excused names.

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
        return hasattr(f.backend.space(f.array(1.0)).leaf_xp, "bfloat16")
    if law is vectors.mixed_precision:
        return f.dtype == "float64"
    return law not in optional.LAWS or law in optional.derived_by(f.backend)
