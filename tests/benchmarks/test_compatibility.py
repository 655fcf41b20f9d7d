"""The check of other packages tells right, wrong and missing second derivatives apart."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rows():
    from benchmarks.compatibility import jax_rows, torch_rows

    with jax.enable_x64(True):
        yield {row.part: row for row in [*torch_rows.ROWS, *jax_rows.ROWS]}


@pytest.mark.parametrize(
    ("part", "expected", "shown"),
    [
        ("`nn.BatchNorm1d`", "right", "| right | "),
        ("`nn.EmbeddingBag`", "raises", "| raises | `embedding(index).mean(1)` | `NotImplementedError` | |"),
        ("`norm()` of a vector of zeros", "nan", "| nan | `(x.square().sum() + eps).sqrt()` | nan | finds it |"),
        ("`parametrizations.spectral_norm` in train mode", "wrong", "| wrong | `eval()` after some passes | "),
        pytest.param("`jnp.hypot` at equal arguments", "wrong", "| 1e+00 | finds it |", marks=pytest.mark.slow),
        ("the same, as `jnp.sqrt(x**2 + y**2)`", "right", "| right | "),
    ],
)
def test_a_row_is_as_expected_and_nothing_else_passes(rows, part, expected, shown, capsys):
    from benchmarks.compatibility.__main__ import check

    row = rows[part]
    assert row.expected == expected
    assert check(row)
    assert shown in capsys.readouterr().out
    assert not check(row._replace(expected="another"))


def test_a_loss_without_a_gradient_is_an_error(rows):
    from benchmarks.compatibility.__main__ import check

    def broken(params):
        raise TypeError("no loss")

    row = rows["`nn.EmbeddingBag`"]
    with pytest.raises(TypeError, match="no loss"):
        check(row._replace(make=lambda: (broken, row.make()[1])))


def test_the_page_has_every_row(rows):
    page = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    pinned = (ROOT / "benchmarks" / "compatibility" / "packages.txt").read_text("utf-8")
    for row in rows.values():
        assert f"| {row.part} | {row.expected} |" in page
        assert row.package in ("torch", "jax") or f"\n{row.package.replace('_', '-')}==" in pinned
