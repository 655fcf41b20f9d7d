"""Names, options and files to solvers and backends; a mistake gets the nearest name, the option and the range."""

import re
import sys
from argparse import Namespace

import pytest

import bilevel as bl
from bilevel.config import solver_options
from bilevel.convergence import check_on_failure
from bilevel.messages import SYNONYMS
from bilevel.testing import check_hypergradient


class TestNames:
    def test_an_unknown_solver_suggests_the_nearest(self):
        with pytest.raises(
            ValueError, match=r"there is no 'neuman'\. Did you mean 'neumann'\? There is: bicgstab, cg, exact"
        ):
            bl.get_solver("neuman")

    def test_a_class_s_name_suggests_that_of_the_solver(self):
        for name in ("CG", "GMRES", "BiCGStab"):
            with pytest.raises(ValueError, match=f"there is no '{name}'. Did you mean '{name.lower()}'"):
                bl.get_solver(name)

    def test_an_unknown_option_suggests_the_nearest(self):
        with pytest.raises(
            TypeError, match=r"solver 'cg' has no option 'max_iter'\. Did you mean 'maxiter'\? There is: atol"
        ):
            bl.get_solver({"name": "cg", "max_iter": 3})

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("conjugate_gradient", "cg"),
            ("conjugate-gradient", "cg"),
            ("Conjugate Gradients", "cg"),
            ("hessian_free", "cg"),
            ("direct", "exact"),
            ("LiSSA", "neumann"),
            ("unroll", "unrolled"),
        ],
    )
    def test_another_name_of_a_solver(self, wrong, right):
        with pytest.raises(ValueError, match=f"there is no '{wrong}'. Did you mean '{right}'"):
            bl.get_solver(wrong)

    @pytest.mark.parametrize(
        ("name", "wrong", "right"),
        [
            ("neumann", "lr", "step_size"),
            ("neumann", "learning_rate", "step_size"),
            ("neumann", "alpha", "step_size"),
            ("neumann", "steps", "terms"),
            ("neumann", "maxiter", "terms"),
            ("neumann", "K", "terms"),
            ("cg", "tol", "rtol"),
            ("cg", "max_iter", "maxiter"),
            ("cg", "steps", "maxiter"),
            ("cg", "iterations", "maxiter"),
            ("cg", "reg", "damping"),
            ("minres", "lambda", "damping"),
            ("gmres", "tol", "rtol"),
            ("gmres", "maxiter", "max_restarts"),
            ("nystrom", "k", "rank"),
            ("unrolled", "lr", "step_size"),
            ("unrolled", "num_steps", "steps"),
            ("unrolled", "max_iter", "steps"),
        ],
    )
    def test_another_name_of_an_option(self, name, wrong, right):
        with pytest.raises(TypeError, match=f"solver '{name}' has no option '{wrong}'. Did you mean '{right}'"):
            bl.get_solver({"name": name, wrong: 1})

    def test_other_names_lead_to_names_that_exist(self):
        options = {option for name in bl.list_solvers() for option in solver_options(type(bl.get_solver(name)))}
        for names in SYNONYMS.values():
            assert set(names) <= options | set(bl.list_solvers())

    def test_an_unknown_override_of_a_solver_object(self):
        with pytest.raises(TypeError, match=r"solver 'CG' has no option 'terms'"):
            bl.get_solver(bl.CG(), terms=3)

    def test_an_unknown_preconditioner_suggests_the_nearest(self):
        with pytest.raises(
            ValueError,
            match=r"preconditioner: there is no 'nystrøm'\. Did you mean 'nystrom'\? There is: diagonal, nystrom",
        ):
            bl.get_solver({"name": "cg", "preconditioner": "nystrøm"})

    @pytest.mark.parametrize("name", ["kfac", "EKFAC", {"name": "kronecker"}], ids=str)
    def test_kronecker_factors_are_left_out_for_a_reason(self, name):
        with pytest.raises(
            ValueError,
            match=r"there is no '(kfac|EKFAC|kronecker)'\. Kronecker factors were measured and left out: .* or more\. "
            r'Use "nystrom" \(bl\.NystromPreconditioner\)\. There is: diagonal, nystrom',
        ):
            bl.get_solver({"name": "cg", "preconditioner": name})

    def test_an_unknown_option_of_a_preconditioner(self):
        with pytest.raises(TypeError, match=r"preconditioner 'nystrom' has no option 'ranks'\. Did you mean 'rank'"):
            bl.get_solver({"name": "cg", "preconditioner": {"name": "nystrom", "ranks": 3}})

    def test_a_preconditioner_that_is_none(self):
        for wrong, hint in (("nystrom", ""), (3, ""), (bl.NystromPreconditioner, "Call the class")):
            with pytest.raises(
                TypeError,
                match=rf"CG\.preconditioner: expected a function v -> M v, or an object with methods init\(\) .*{hint}",
            ):
                bl.CG(preconditioner=wrong)

    def test_an_unknown_backend_suggests_the_nearest(self):
        with pytest.raises(ValueError, match=r"there is no 'pytorch'\. Did you mean 'torch'\?"):
            bl.get_backend("pytorch")

    def test_a_missing_framework_says_how_to_install_it(self, monkeypatch):
        for name in [m for m in sys.modules if m.partition(".")[0] in ("jax", "bilevel_jax")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "jax", None)  # what import then finds
        from bilevel import config

        config._load_backend.cache_clear()
        with pytest.raises(ImportError, match=re.escape('pip install "bilevel[jax]"')):
            bl.get_backend("jax")
        config._load_backend.cache_clear()

    @pytest.mark.parametrize(
        ("spec", "error", "message"),
        [
            ({"maxiter": 3}, ValueError, "has no name"),
            ({"name": "cg", True: 3}, TypeError, "solver 'cg' has no option True"),  # YAML's key ``on``
            (
                Namespace(name="cg"),
                TypeError,
                r"got Namespace\(name='cg'\)\. Convert a namespace .* vars\(\)",
            ),
            (3, TypeError, "expected a name, a mapping, a TOML file, or an object"),
            (bl.CG, TypeError, r"expected an object, got the class CG\. Call it: bl\.CG\(\)\.$"),
            ({"name": "cg", "maxiter": -1}, ValueError, r"CG\.maxiter: expected an integer >= 0, got -1"),
            ({"name": "cg", "maxiter": 2.5}, TypeError, r"CG\.maxiter: expected an integer >= 0, got 2\.5"),
            ({"name": "cg", "maxiter": True}, TypeError, r"CG\.maxiter: expected an integer"),
            ({"name": "cg", "rtol": "a"}, TypeError, r"CG\.rtol: expected a finite number >= 0 or None, got 'a'"),
            (
                {"name": "cg", "rtol": float("nan")},
                ValueError,
                r"CG\.rtol: expected a finite number >= 0 or None, got nan",
            ),
            ({"name": "cg", "damping": -0.1}, ValueError, r"CG\.damping: expected a finite number >= 0"),
            ({"name": "cg", "atol": None}, TypeError, r"CG\.atol: expected a finite number"),
            (
                {"name": "neumann", "step_size": 0},
                ValueError,
                r"Neumann\.step_size: expected a finite number > 0",
            ),
            (
                {"name": "neumann", "step_size": "auot"},
                ValueError,
                r'Neumann\.step_size: expected a number > 0 or "auto"',
            ),
            ({"name": "neumann", "terms": -1}, ValueError, r"Neumann\.terms: expected an integer >= 0"),
            (
                {"name": "identity", "scale": float("inf")},
                ValueError,
                r"Identity\.scale: expected a finite number",
            ),
            ({"name": "unrolled", "steps": 0}, ValueError, r"Unrolled\.steps: expected an integer >= 1"),
            (
                {"name": "unrolled", "truncation": 0},
                ValueError,
                r"Unrolled\.truncation: expected an integer >= 1",
            ),
            ({"name": "neumann", "rtol": -1e-3}, ValueError, r"Neumann\.rtol: expected a finite number >= 0"),
            ({"name": "gmres", "restart": 0}, ValueError, r"GMRES\.restart: expected an integer >= 1, got 0"),
            ({"name": "gmres", "max_restarts": 0}, ValueError, r"GMRES\.max_restarts: expected an integer >= 1"),
            ({"name": "bicgstab", "atol": -1}, ValueError, r"BiCGStab\.atol: expected a finite number >= 0"),
            ({"name": "nystrom", "rank": 0}, ValueError, r"Nystrom\.rank: expected an integer >= 1, got 0"),
            ({"name": "nystrom", "damping": 0}, ValueError, r"Nystrom\.damping: expected a finite number > 0"),
            ({"name": "nystrom", "seed": 0.5}, TypeError, r"Nystrom\.seed: expected an integer >= 0"),
            (
                {"name": "cg", "preconditioner": {"name": "diagonal", "samples": 0}},
                ValueError,
                r"DiagonalPreconditioner\.samples: expected an integer >= 1",
            ),
            (
                {"name": "cg", "preconditioner": {"rank": 3}},
                ValueError,
                r"preconditioner: the mapping \{'rank': 3\} has no name, as in \{\"name\": \"nystrom\"",
            ),
            ({"name": "exact", "damping": "x"}, TypeError, r"Exact\.damping: expected a finite number"),
        ],
        ids=str,
    )
    def test_options_are_checked_by_name_and_range(self, spec, error, message):
        with pytest.raises(error, match=message):
            bl.get_solver(spec)


class TestChoices:
    @pytest.mark.parametrize(
        ("make", "text"),
        [
            (
                lambda: bl.Unrolled(mode="forwards"),
                'Unrolled.mode: expected "reverse" or "forward", got \'forwards\'. Did',
            ),
            (lambda: bl.Unrolled(checkpoint="on"), "Unrolled.checkpoint: expected True, False or \"auto\", got 'on'."),
            (lambda: bl.Unrolled(optimizer="sgd"), 'Unrolled.optimizer: expected "descent" or "adam", got \'sgd\'.'),
            (
                lambda: bl.Problem(len, len, curvature="gauss_newton"),
                'Problem.curvature: expected "hessian", "gauss-newton" or "finite-differences", got \'gauss_newton\'. '
                'Did you mean "gauss-newton"?',
            ),
            (lambda: check_on_failure("quiet"), 'on_failure: expected "raise", "warn" or "ignore", got \'quiet\'.'),
            (
                lambda: check_hypergradient(None, None, None, reference="exakt"),
                'reference: expected "exact", "finite-differences" or "retraining", got \'exakt\'. Did you mean '
                '"exact"?',
            ),
        ],
    )
    def test_all_messages_have_one_form(self, make, text):
        with pytest.raises(ValueError, match=re.escape(text)):
            make()


class TestConfig:
    def test_a_toml_file(self, tmp_path):
        file = tmp_path / "solver.toml"
        file.write_text('[solver]\nname = "neumann"\nterms = 7\nstep_size = 1\n')
        expected = bl.Neumann(terms=7, step_size=1)
        assert bl.get_solver(file) == bl.get_solver(str(file)) == expected
        assert bl.get_solver(file, terms=2) == bl.Neumann(terms=2, step_size=1)

    def test_a_toml_file_with_a_byte_order_mark(self, tmp_path):
        file = tmp_path / "solver.toml"
        file.write_text('[solver]\nname = "cg"\n', "utf-8-sig")  # as Windows may save it
        assert bl.get_solver(file) == bl.CG()

    @pytest.mark.parametrize("name", ["solver.yaml", "conf/solver.yml", "solver.json"])
    def test_a_file_of_another_format(self, name):
        with pytest.raises(ValueError, match=r"is no TOML file\. Load other formats, and pass the mapping"):
            bl.get_solver(name)

    def test_a_toml_file_without_the_table(self, tmp_path):
        file = tmp_path / "solver.toml"
        file.write_text("a = 1\n")
        with pytest.raises(ValueError, match=r"solver\.toml: expected a table \[solver\]"):
            bl.get_solver(file)
        file.write_text('[solver]\nname = "cg"\n[preconditioner]\nname = "nystrom"\n')
        with pytest.raises(
            ValueError, match=r"\[preconditioner\] belongs to the solver: write \[solver\.preconditioner"
        ):
            bl.get_solver(file)
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # the last two as Windows may save it
            file.write_text("[solver\n", encoding)
            with pytest.raises(ValueError, match=r"solver\.toml: this is not TOML"):
                bl.get_solver(file)

    @pytest.mark.parametrize(
        ("content", "error", "text"),
        [
            ('name = "cg"\nmaxiter = "5"', TypeError, "CG.maxiter: expected an integer >= 0, got '5'"),
            ('name = "cg"\nrtol = -1', ValueError, "CG.rtol: expected a finite number >= 0 or None, got -1"),
            ('name = "cg"\nsteps = 1', TypeError, "solver 'cg' has no option 'steps'. Did you mean 'maxiter'?"),
            ('nme = "cg"', ValueError, "the mapping {'nme': 'cg'} has no name"),
            ('name = "gc"', ValueError, "there is no 'gc'"),
        ],
    )
    def test_an_error_names_the_file(self, tmp_path, content, error, text):
        file = tmp_path / "solver.toml"
        file.write_text(f"[solver]\n{content}\n")
        with pytest.raises(error, match=rf"^.*solver\.toml: (solver: )?{re.escape(text)}"):
            bl.get_solver(file)

    def test_none_as_a_word(self, tmp_path):
        file = tmp_path / "solver.toml"
        file.write_text('[solver]\nname = "cg"\nrtol = "none"\npreconditioner = "none"\n')
        assert bl.get_solver(file) == bl.CG(rtol=None)
        assert bl.get_solver("minres", rtol="none") == bl.MINRES(rtol=None)
        assert bl.get_solver({"name": "unrolled", "truncation": "none"}) == bl.Unrolled(truncation=None)

    def test_a_preconditioner_within(self, tmp_path):
        file = tmp_path / "solver.toml"
        file.write_text('[solver]\nname = "cg"\n[solver.preconditioner]\nname = "nystrom"\nrank = 7\n')
        expected = bl.CG(preconditioner=bl.NystromPreconditioner(rank=7))
        assert bl.get_solver(file) == expected
        assert bl.get_solver({"name": "cg", "preconditioner": {"name": "nystrom", "rank": 7}}) == expected
        assert bl.get_solver(bl.CG(), preconditioner="diagonal").preconditioner == bl.DiagonalPreconditioner()
        assert bl.get_solver(expected, preconditioner=None) == bl.CG()

    def test_objects_pass_and_may_be_changed(self):
        assert bl.get_solver(bl.CG(maxiter=3)) == bl.CG(maxiter=3)
        assert bl.get_solver(bl.CG(maxiter=3), rtol=1e-3) == bl.CG(maxiter=3, rtol=1e-3)

    def test_every_solver_is_reachable_by_its_name(self):
        names = ["bicgstab", "cg", "exact", "gmres", "identity", "minres", "neumann", "nystrom", "unrolled"]
        assert set(names) <= set(bl.list_solvers())
        assert set(bl.list_preconditioners()) >= {"diagonal", "nystrom"}
        for name in names:
            assert type(bl.get_solver(name)).__name__.lower() == name
