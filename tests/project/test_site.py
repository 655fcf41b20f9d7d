"""The documentation site: the API reference is complete, and pages change as the site needs it."""

import importlib
from collections import Counter

import pytest
from api_links import with_references
from markdown_text import docstring_as_markdown, with_formulas, with_indented_items
from public_names import FURTHER, entries, exported, public_names
from site_pages import with_site_links


def test_every_public_name_has_one_entry_and_every_entry_is_a_public_name():
    public = public_names()
    listed = [name for _, name in entries()]
    assert [name for name in listed if name not in public] == [], "entries in docs/api without a public name"
    counts = Counter(public[name] for name in listed)
    assert [name for name, place in public.items() if not counts[place]] == [], "public names without an entry"
    assert [place for place, count in counts.items() if count > 1] == [], "objects with several entries"


@pytest.mark.parametrize(
    "package", ["bilevel", "bilevel.linear_solvers", "bilevel_numpy", "bilevel_torch", "bilevel_jax"]
)
def test_the_definitions_in_the_sources_are_the_objects_of_the_packages(package):
    pytest.importorskip(package.removeprefix("bilevel_") if package in ("bilevel_torch", "bilevel_jax") else "numpy")
    module = importlib.import_module(package)
    assert module.__all__ == exported(package)
    for name, place in public_names().items():
        if name.rpartition(".")[0] == package:
            source, _, attribute = place.rpartition(".")
            # Not by an attribute of the package: bilevel.hypergradient is a function and a module.
            assert getattr(importlib.import_module(source), attribute) is getattr(module, name.rpartition(".")[2])


def test_the_further_names_exist():
    for name in FURTHER:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name)


def test_formulas_are_converted_where_github_shows_them():
    text = "a\n\n```math\nx^2\n+ 1\n```\n\n```python\n```math\n```\n"
    made = with_formulas(text, lambda latex: f"<math>{latex.split()}</math>")
    assert made == "a\n\n<div><math>['x^2', '+', '1']</math></div>\n\n```python\n```math\n```\n"


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("quickstart.md", "[a](solvers.md#cost)", "[a](solvers.md#cost)"),
        ("solvers.md", "[a](../benchmarks/RESULTS.md#many-queries)", "[a](results.md#many-queries)"),
        ("jax.md", "[`a`](../examples/jax/optax_loop.py)", "[`a`](examples/jax/optax_loop.md)"),
        ("jax.md", "[a](../examples/jax)", "[a](examples.md)"),
        ("paper.md", "[`a`](../examples/paper/results)", "`a`"),
        ("examples.md", "[a](../docs/paper.md) and [b](solver.toml)", "[a](paper.md) and [b](examples/solver.md)"),
        ("results.md", "[a](../docs/which-method.md) [b](results)", "[a](which-method.md) b"),
        ("changelog.md", "![a](docs/demo.png)", "![a](demo.png)"),
        ("contributing.md", "[a](docs/no-such-page.md)", "[a](docs/no-such-page.md)"),
        ("index.md", "[a](notebooks/by-hand.ipynb#use-it)", "[a](notebooks/by-hand.md#use-it)"),
        ("notebooks/by-hand.md", "[a](../theory.md) [b](whole-run.ipynb)", "[a](../theory.md) [b](whole-run.md)"),
        ("notebooks/by-hand.md", "[a](../../benchmarks/RESULTS.md)", "[a](../results.md)"),
        ("api/torch.md", "[a](../../CHANGELOG.md)", "[a](../changelog.md)"),
        ("solvers.md", "`f[0](x)`, [a](https://example.org/CHANGELOG.md)", None),
    ],
)
def test_links_lead_to_pages_of_the_site(page, link, expected):
    assert with_site_links(link, page) == (link if expected is None else expected)


@pytest.mark.parametrize(
    ("page", "html", "anchor"),
    [
        ("jax.md", "<code>bl.hypergradient</code>", "bilevel.hypergradient.hypergradient"),
        ("jax.md", '<code>bl.CG(rtol=None, name="a")</code>', "bilevel.linear_solvers.cg.CG"),
        ("jax.md", "<code>bilevel.linear_solvers.CG</code>", "bilevel.linear_solvers.cg.CG"),
        ("jax.md", "<code>@bilevel_jax.implicit_minimizer(f)</code>", "bilevel_jax.implicit.implicit_minimizer"),
        ("jax.md", "<code>bl.Problem.from_model</code>", "bilevel.problems.problem.Problem.from_model"),
        ("jax.md", "<code>f(x)</code> <b>g(<code>y)</code>", None),
        ("jax.md", "<code>CG</code>", None),
        ("jax.md", '<a href="x"><code>bl.CG</code></a>', None),
        ("jax.md", "<h2>About <code>bl.CG</code></h2>", None),
        ("jax.md", "<pre><code>bl.CG</code></pre>", None),
        ("api/solvers.md", "<code>CG</code>", "bilevel.linear_solvers.cg.CG"),
        ("api/torch.md", "<code>TrainingStep</code>", "bilevel_torch.training.step.TrainingStep"),
        ("api/jax.md", "<code>TrainingStep</code>", "bilevel_jax.training.step.TrainingStep"),
        ("api/torch.md", "<code>CG</code>", "bilevel.linear_solvers.cg.CG"),
        ("api/solvers.md", "<code>Preconditioner</code>", "bilevel.preconditioners.preconditioner.Preconditioner"),
        ("api/torch.md", "<code>backend</code>", None),
    ],
)
def test_public_names_in_code_link_to_their_entries(page, html, anchor):
    optional = " optional" if html == "<code>bl.Problem.from_model</code>" else ""
    expected = f'<autoref identifier="{anchor}"{optional}>{html}</autoref>' if anchor else html
    assert with_references(html, page) == expected


@pytest.mark.parametrize("name", ["bl.no_such_name", "bilevel_torch.no_such_name", "bilevel_jax.no.such.name"])
def test_names_without_an_entry_are_reported_except_in_the_changelog(name, caplog):
    html = f"<code>{name}</code>"
    assert with_references(html, "changelog.md") == html
    assert caplog.messages == []
    assert with_references(html, "jax.md") == html
    assert caplog.messages == [f"jax.md: `{name}` is no public name with an entry in docs/api."]


def test_items_of_lists_are_indented_by_four_spaces():
    text = "- a\n  b\n\n      code\n- c\n\nd\n\n10. e\n    f\n\n```\n- g\n  h\n```\n"
    assert with_indented_items(text) == "- a\n    b\n\n        code\n\n- c\n\nd\n\n10. e\n    f\n\n```\n- g\n  h\n```\n"


def test_nothing_in_docstrings_is_a_quotation():
    docstring = "Return 3.\n\n>>> f(\n...     2)\n[1,\n  2]\n\nArgs:\n    a, b: > 0.\n\n    >>> 1\n    1"
    assert docstring_as_markdown(docstring) == (
        "Return 3.\n\n```pycon\n>>> f(\n...     2)\n[1,\n  2]\n```\n\n"
        "Args:\n    a, b: \\> 0.\n\n    ```pycon\n    >>> 1\n    1\n    ```"
    )
