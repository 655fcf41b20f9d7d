"""The `bilevel` command: what it shows, and one clear line for every mistake."""

import importlib.util
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import bilevel as bl
from bilevel.cli import main

needs_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("sklearn", "matplotlib", "tqdm")),
    reason="the demo's packages are not installed",
)


def error_of(capsys, *argv):
    """Run the command, expect exit code 2, and return the one line that it prints."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"bilevel {version('bilevel')}\n"
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"bilevel {version('bilevel')}\n"


def test_the_commands_of_the_help_exist(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    named = re.findall(r"^  bilevel (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert named == ["info", "demo", "diagnose"]
    for command in named:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])


class TestInfo:
    @pytest.fixture
    def out(self, capsys):
        assert main(["info"]) == 0
        return capsys.readouterr().out

    def test_names_versions_and_devices(self, out):
        assert out.startswith(f"bilevel {version('bilevel')}, Python {platform.python_version()}")
        assert re.search(rf"^  numpy +{re.escape(version('numpy'))}, on cpu$", out, re.MULTILINE)

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_a_framework_is_there_or_says_how_to_get_it(self, out, name):
        missing = f'which is not installed: pip install "bilevel[{name}]".'
        here = f"{version(name)}, on cpu" if importlib.util.find_spec(name) else missing
        assert re.search(rf"^  {name} .*{re.escape(here)}", out, re.MULTILINE)

    def test_shows_every_solver_with_its_defaults(self, out):
        for name in bl.list_solvers():
            assert re.search(rf"^  {name} ", out, re.MULTILINE)
        assert "maxiter=200, rtol=1e-05, atol=0.0, damping=0.0" in out
        assert "terms=20, step_size='auto', damping=0.0" in out


PROBLEM = """
import numpy as np
import bilevel as bl

problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))

def solved():
    return {"problem": problem, "params": np.array([1.0, 0.25]), "hparams": np.ones(2)}

def unsolved():
    return solved() | {"params": np.array([3.0, 3.0]), "solver": "minres"}

def wrong():
    return {"problem": problem, "weights": 1}

def none():
    pass

def misspelled():
    return solved() | {"inner_arg": ()}

def broken():
    raise ValueError("my own error")

def wrong_solver():
    return solved() | {"solver": {"name": "cg", "rtoll": 1}}
"""


class TestDiagnose:
    @pytest.fixture
    def place(self, tmp_path, monkeypatch):
        (tmp_path / "my_check.py").write_text(PROBLEM)
        monkeypatch.setattr("sys.path", list(sys.path))
        monkeypatch.delitem(sys.modules, "my_check", raising=False)
        return str(tmp_path / "my_check.py")

    def test_a_report_without_findings(self, place, capsys):
        assert main(["diagnose", f"{place}:solved"]) == 0
        assert capsys.readouterr().out == f"{bl.diagnose(**sys.modules['my_check'].solved())}\n"

    def test_findings_are_exit_code_1(self, place, capsys):
        assert main(["diagnose", f"{place}:unsolved"]) == 1
        assert capsys.readouterr().out.startswith("bl.diagnose: 1 finding\n\n> inner problem")

    def test_a_module_of_the_current_folder(self, place, capsys, monkeypatch):
        monkeypatch.chdir(Path(place).parent)
        assert main(["diagnose", "my_check:solved"]) == 0

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("solve", "has no function 'solve'. Did you mean 'solved'? There is: broken, misspelled, none, solved"),
            ("misspelled", "bilevel.diagnose has no argument 'inner_arg'. Did you mean 'inner_args'?"),
            ("wrong", "expected a dict with problem, params and hparams, .* got ['problem', 'weights']."),
            ("none", "got NoneType."),
        ],
    )
    def test_errors(self, place, function, message, capsys):
        line = error_of(capsys, "diagnose", f"{place}:{function}")
        assert all(part in line for part in message.split(".* "))

    @pytest.mark.parametrize(
        ("function", "last"),
        [
            ("broken", "ValueError: my own error"),
            ("wrong_solver", "TypeError: solver 'cg' has no option 'rtoll'. Did you mean 'rtol'?"),
        ],
    )
    def test_errors_of_the_users_code_have_a_traceback(self, place, function, last, capsys):
        assert main(["diagnose", f"{place}:{function}"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback")
        assert lines[-1].startswith(last)

    def test_a_file_with_the_name_of_a_loaded_module(self, place, capsys):
        path = Path(place).rename(Path(place).parent / "random.py")
        loaded = sys.modules["random"]
        assert main(["diagnose", f"{path}:solved"]) == 0
        assert sys.modules["random"] is loaded

    def test_a_file_that_is_no_program(self, place, capsys):
        Path(place).write_text("def f(:")
        assert "invalid syntax (my_check.py, line 1)" in error_of(capsys, "diagnose", f"{place}:f")

    def test_a_target_that_does_not_exist(self, place, capsys):
        assert "expected FILE.py:FUNCTION or MODULE:FUNCTION, got 'train.py'" in error_of(
            capsys, "diagnose", "train.py"
        )
        assert "nowhere.py" in error_of(capsys, "diagnose", "nowhere.py:check")
        assert "No module named 'no_such_module'" in error_of(capsys, "diagnose", "no_such_module:check")


@needs_demo
class TestMistakes:
    def test_a_typo_in_the_solver(self, capsys):
        assert "there is no 'cgg'. Did you mean 'cg'?" in error_of(capsys, "demo", "--solver", "cgg")

    def test_a_typo_in_the_backend(self, capsys):
        assert "there is no 'nunpy'. Did you mean 'numpy'?" in error_of(capsys, "demo", "--backend", "nunpy")

    def test_a_typo_in_an_option(self, capsys):
        line = error_of(capsys, "demo", "--set", "dampin=1")
        assert "solver 'CG' has no option 'dampin'. Did you mean 'damping'?" in line

    def test_an_option_of_another_solver(self, capsys):
        line = error_of(capsys, "demo", "--set", "terms=50")
        assert "solver 'CG' has no option 'terms'." in line
        assert "This is the demo's default solver. Choose another one, such as --solver neumann." in line
        assert "default solver" not in error_of(capsys, "demo", "--solver", "cg", "--set", "terms=50")

    def test_an_option_out_of_range(self, capsys):
        assert "CG.rtol: expected a finite number >= 0 or None, got -1" in error_of(capsys, "demo", "--set", "rtol=-1")

    def test_an_option_of_a_wrong_type(self, capsys):
        line = error_of(capsys, "demo", "--solver", "neumann", "--set", "terms=1.5")
        assert "Neumann.terms: expected an integer >= 0, got 1.5" in line

    def test_a_config_file_that_is_not_there(self, capsys):
        assert "nowhere.toml" in error_of(capsys, "demo", "--config", "nowhere.toml")

    def test_a_config_file_without_a_solver(self, capsys, tmp_path):
        path = tmp_path / "empty.toml"
        path.write_text("[model]\n")
        assert "expected a table [solver]" in error_of(capsys, "demo", "--config", str(path))

    def test_a_folder_that_cannot_be_made(self, capsys, tmp_path):
        (tmp_path / "file").touch()
        assert "file" in error_of(capsys, "demo", "--out", str(tmp_path / "file" / "folder"))

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["demo", "--set", "damping"], "expected KEY=VALUE, as in rtol=1e-6, got 'damping'"),
            (["demo", "--set", "=1"], "expected KEY=VALUE"),
            (["demo", "--seed", "-1"], "expected an integer >= 0, got '-1'"),
            (["demo", "--solver", "cg", "--config", "x.toml"], "not allowed with argument"),
            (["dem"], "invalid choice: 'dem'"),
            ([], "required: command"),
        ],
    )
    def test_arguments_that_do_not_parse(self, argv, message, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        assert message in capsys.readouterr().err


def test_missing_packages_name_the_command_that_installs_them(capsys, monkeypatch):
    monkeypatch.setattr("bilevel.demo.data.find_spec", lambda name: None)
    assert 'scikit-learn, which is not installed: pip install "bilevel[demo]"' in error_of(capsys, "demo")


class TestArguments:
    """What reaches the demo."""

    @pytest.fixture
    def call(self, monkeypatch):
        calls = []
        monkeypatch.setattr("bilevel.demo.demo", lambda *args: calls.append(args))

        def call(*argv):
            assert main(["demo", *argv]) == 0
            return calls[-1]

        return call

    def test_by_default(self, call):
        assert call() == ("numpy", None, {}, 0, Path())

    def test_options_are_typed_as_in_toml_and_words_need_no_quotes(self, call):
        argv = ("--solver", "neumann", "--set", "terms=50", "--set", "step_size=auto", "--set", "damping = 1e-3")
        assert call(*argv)[1:3] == ("neumann", {"terms": 50, "step_size": "auto", "damping": 1e-3})

    def test_a_config_file_and_what_overrides_it(self, call, tmp_path):
        path = tmp_path / "solver.toml"
        path.write_text('[solver]\nname = "neumann"\nterms = 3\n')
        _, solver, options, _, _ = call("--config", str(path), "--set", "terms=4")
        assert bl.get_solver(solver, **options) == bl.Neumann(terms=4)

    def test_several_backends_run_in_turn_with_a_summary(self, monkeypatch, capsys):
        names = []
        monkeypatch.setattr("bilevel.demo.demo", lambda name, *rest: names.append(name))
        monkeypatch.setattr("bilevel.demo.summary", lambda runs: f"a table of {len(runs)}")
        assert main(["demo", "--backend", "numpy", "numpy"]) == 0
        assert names == ["numpy", "numpy"]
        assert capsys.readouterr().out == "a table of 2\n"
        assert "there is no 'nunpy'" in error_of(capsys, "demo", "--backend", "numpy", "nunpy")
        assert len(names) == 2  # the wrong name was found before the first run

    def test_the_rest(self, call):
        assert call("--backend", "numpy", "--seed", "3", "--out", "x/y") == ("numpy", None, {}, 3, Path("x/y"))


def test_a_solve_that_fails_is_one_line(capsys, monkeypatch):
    def fail(*args):
        raise bl.SolverError("CG: nan or inf.")

    monkeypatch.setattr("bilevel.demo.demo", fail)
    assert error_of(capsys, "demo") == "bilevel: error: CG: nan or inf.\n"


@pytest.mark.parametrize("command", [["version"], ["diagnose", "train.py:check"]])
def test_a_reader_that_closes_the_pipe_ends_the_command(command, tmp_path, monkeypatch, capfd):
    (tmp_path / "train.py").write_text("def check():\n    print('step', flush=True)\n")
    monkeypatch.chdir(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main(command) == 141
        print("more", flush=True)  # Python writes the rest at its exit
    assert capfd.readouterr().err == ""


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*args):
        raise TypeError("a bug")

    monkeypatch.setattr("bilevel.demo.demo", fail)
    with pytest.raises(TypeError, match="a bug"):
        main(["demo"])
