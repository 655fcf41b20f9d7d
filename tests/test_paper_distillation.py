"""The section 5.3 of the paper, small: distilled images teach more than real ones, and the two frameworks agree."""

import pytest
from frameworks import framework, paper

torch = pytest.importorskip("torch")
for module in ("sklearn", "matplotlib", "tqdm", "jax", "optax"):
    pytest.importorskip(module)

import numpy as np  # noqa: E402

import bilevel as bl  # noqa: E402
from bilevel.testing import check_hypergradient  # noqa: E402


@pytest.fixture(scope="module")
def distillation():
    return paper("distillation")


@pytest.fixture(scope="module")
def found(distillation, tmp_path_factory):
    out = tmp_path_factory.mktemp("distillation")
    return out, distillation.main(["--fast", "--out", str(out)])


def test_distilled_images_teach_more_than_as_many_real_ones(found):
    results = {name: history["result"] for name, history in found[1].items()}
    real = results["mnist-random-images-0"]["refitted_accuracy"]
    for method in ("identity", "neumann-5", "neumann-20", "cg-10", "jax-cg-10"):
        rows = found[1][f"mnist-{method}-0"]["rows"]
        assert rows[-1]["val_loss"] < rows[0]["val_loss"]
        assert results[f"mnist-{method}-0"]["refitted_accuracy"] > real
        assert results[f"mnist-{method}-0"]["hparams"] == 10 * 8 * 8
    assert results["cifar-cg-10-0"]["refitted_accuracy"] > results["cifar-random-images-0"]["refitted_accuracy"]


def test_jax_and_torch_distil_the_same(found):
    in_torch, in_jax = (found[1][f"mnist-{method}-0"]["result"] for method in ("cg-10", "jax-cg-10"))
    assert in_jax["difference_from_torch"] < 1e-4
    assert in_jax["val_loss"] == pytest.approx(in_torch["val_loss"], rel=0.05)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_hypergradient_is_the_exact_one(distillation, name):
    backend, rng = framework(name), np.random.default_rng(0)
    functions = torch if name == "torch" else pytest.importorskip("jax.numpy")
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((6, 10), (10,), (10, 6), (30, 6))]
    kernel, bias, images, real = map(backend.from_numpy, arrays)
    labels = backend.from_numpy(distillation.LABELS)
    targets = backend.from_numpy(distillation.LABELS[rng.integers(10, size=30)])
    losses = distillation.problem(functions)

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


def test_stored_histories_are_not_run_again(distillation, found, monkeypatch):
    out, histories = found
    monkeypatch.setattr(distillation, "refit", None)
    assert distillation.main(["--fast", "--out", str(out)]) == histories


def test_report_of_it(found, tmp_path):
    report = paper("report.distillation")
    assert all(report.row(found[1]))
    section = report.section(found[1], tmp_path)
    assert "| Neumann 20 |" in section
    assert (tmp_path / "distillation.png").exists()
