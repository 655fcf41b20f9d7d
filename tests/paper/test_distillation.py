"""The section 5.3 of the paper, small: distilled images teach more than real ones, and the two frameworks agree."""

import pytest
from frameworks import framework
from paper_systems import check_stored, report_of

torch = pytest.importorskip("torch")
for module in ("sklearn", "matplotlib", "tqdm", "jax", "optax"):
    pytest.importorskip(module)

import numpy as np  # noqa: E402

import bilevel as bl  # noqa: E402
from bilevel.testing import check_hypergradient  # noqa: E402


def test_distilled_images_teach_more_than_as_many_real_ones(histories):
    results = {name: history["result"] for name, history in histories.items()}
    real = results["mnist-random-images-0"]["refitted_accuracy"]
    for method in ("identity", "neumann-5", "neumann-20", "cg-10", "jax-cg-10"):
        rows = histories[f"mnist-{method}-0"]["rows"]
        assert rows[-1]["val_loss"] < rows[0]["val_loss"]
        assert results[f"mnist-{method}-0"]["refitted_accuracy"] > real
        assert results[f"mnist-{method}-0"]["hparams"] == 10 * 8 * 8
    assert results["cifar-cg-10-0"]["refitted_accuracy"] > results["cifar-random-images-0"]["refitted_accuracy"]


def test_jax_and_torch_distil_the_same(histories):
    in_torch, in_jax = (histories[f"mnist-{method}-0"]["result"] for method in ("cg-10", "jax-cg-10"))
    assert in_jax["difference_from_torch"] < 1e-4
    assert in_jax["val_loss"] == pytest.approx(in_torch["val_loss"], rel=0.05)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_hypergradient_is_the_exact_one(system, name):
    backend, rng = framework(name), np.random.default_rng(0)
    functions = torch if name == "torch" else pytest.importorskip("jax.numpy")
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((6, 10), (10,), (10, 6), (30, 6))]
    kernel, bias, images, real = map(backend.from_numpy, arrays)
    labels = backend.from_numpy(system.LABELS)
    targets = backend.from_numpy(system.LABELS[rng.integers(10, size=30)])
    losses = system.problem(functions)

    def inner(weights, images, targets):
        """Return the training loss, with a penalty on the bias, which else could be shifted by any number."""
        return losses.inner(weights, images, targets) + 0.1 * (weights["bias"] ** 2).sum()

    check_hypergradient(
        bl.Problem(inner, losses.outer),
        {"kernel": kernel, "bias": bias},
        images,
        inner_args=(labels,),
        outer_args=(real, targets),
        solver="cg",
        rtol=1e-3,
    )


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


def test_the_report_has_a_table_and_a_picture(system, histories, tmp_path):
    assert "| Neumann 20 |" in report_of(system, histories, tmp_path)
