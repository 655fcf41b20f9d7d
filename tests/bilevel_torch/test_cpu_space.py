"""The scalars of vectors on the CPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import bilevel as bl  # noqa: E402
from bilevel.operators.linear_operator import LinearOperator  # noqa: E402
from bilevel_torch import TorchBackend, TorchSpace  # noqa: E402
from bilevel_torch.cpu_space import CpuSpace  # noqa: E402


class OfScalars(torch.utils._python_dispatch.TorchDispatchMode):
    """Count the operations whose results all have the shape ()."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.count += all(isinstance(r, torch.Tensor) and r.ndim == 0 for r in results) and bool(results)
        return result


def scalar_operations(space, steps):
    diagonal = torch.linspace(1, 100, 200, dtype=torch.float64)
    A = LinearOperator(space, lambda v: [diagonal * v[0]])
    with OfScalars() as seen:
        bl.CG(maxiter=steps, rtol=0.0, damping=0.0).solve(None, A, [torch.ones(200, dtype=torch.float64)], None)
    return seen.count


@pytest.mark.parametrize(("kind", "most"), [(CpuSpace, 2), (TorchSpace, None)], ids=["numbers", "tensors"])
def test_a_step_of_cg_has_two_dots_and_no_other_operation_on_scalars(kind, most):
    space = kind([torch.ones(200, dtype=torch.float64)])
    per_step = (scalar_operations(space, 30) - scalar_operations(space, 10)) / 20
    assert per_step == most if most else per_step > 20  # tensors, so that no step waits for a device


def test_a_backend_chooses_by_the_device_and_by_how_often_flags_are_read():
    x = torch.ones(2)
    assert type(TorchBackend().space({"a": x})) is CpuSpace
    assert type(TorchBackend(check_every=1).space({"a": x})) is TorchSpace
    assert type(TorchBackend().space({"a": x, "b": x.to("meta")})) is TorchSpace


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_entry_counts_for_finiteness(bad, dtype):
    tree = [torch.zeros(0, dtype=dtype), torch.tensor([1.0, 2.0, -3.0], dtype=dtype), torch.tensor(4.0, dtype=dtype)]
    space = CpuSpace(tree)
    assert space.isfinite(tree)
    assert space.max_abs(tree) == 4
    for leaf, at in ((1, 0), (1, 2), (2, ())):
        broken = [t.clone() for t in tree]
        broken[leaf][at] = bad
        assert not space.isfinite(broken)
        np.testing.assert_equal(float(space.max_abs(broken)), abs(bad))


def test_numbers_have_the_precision_of_the_vectors():
    third = [torch.full((1,), 1 / 3, dtype=torch.float64), torch.ones(1)]
    wide, narrow = CpuSpace(third).dot(third, third), CpuSpace(third[1:]).dot(third[1:], third[1:])
    assert wide == pytest.approx(10 / 9, rel=1e-15)
    assert (wide.dtype, narrow.dtype) == (np.float64, np.float32)
    half = [torch.full((4,), 200.0, dtype=torch.float16)]
    assert CpuSpace(half).dot(half, half) == 160_000  # more than float16 can hold
