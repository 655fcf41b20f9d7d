"""The arguments and results of training functions, as `implicit_minimizer` of each framework reads them."""

import numpy as np
import pytest

import bilevel as bl
from bilevel.config import get_backend
from bilevel.trainings import (
    FIXED_POINT,
    MINIMUM,
    ROOT,
    bind_arguments,
    check_training_result,
    params_noted,
    training_name,
)

backend = get_backend("numpy")
W, LOSS = np.ones(2), np.float64(0.5)


class Ridge:
    pass


def my_training(h, X, steps=100, *, y=None):
    pass


class TestResults:
    @pytest.mark.parametrize(
        ("result", "text"),
        [
            (None, r"^my_training returned None\. Return the params\.$"),
            (
                (W, 0.5),
                r"^my_training returned a tuple of 2, where \[1\] is a float\. Return only the params, or return "
                r"\(params, aux\) and pass has_aux=True\.$",
            ),
            ((W, [1.0, 0.5]), r"a tuple of 2, where \[1\]\[0\] is a float\. Return only"),
            ({"w": W, "epochs": 3}, r"returned a dict, where \['epochs'\] is an int\. Return only .*has_aux=True"),
            ((W, np.arange(2)), r"returned a tuple of 2, where \[1\] is of int64"),
            (Ridge(), r"returned a Ridge\. Return the params\. .*dict\(module\.named_parameters\(\)\)"),
            ("done", r"returned a str\. Return the params\."),
        ],
        ids=lambda value: None if isinstance(value, str) else type(value).__name__,
    )
    def test_more_than_params_is_named(self, result, text):
        with pytest.raises(TypeError, match=text):
            check_training_result(backend, "my_training", result)

    def test_arrays_of_another_framework_are_named(self):
        torch = pytest.importorskip("torch")
        convert = r" of torch, but hparams are of numpy\. Convert the params by np\.asarray, "
        for result, text in ((torch.ones(2), "an array"), ({"w": torch.ones(2)}, r"a dict, where \['w'\] is an array")):
            with pytest.raises(TypeError, match=rf"^my_training returned {text}{convert}"):
                check_training_result(backend, "my_training", result)

    def test_a_tree_of_arrays_is_the_params(self):
        for params in (W, (W, W), {"a": [W], "b": (W, None)}):
            assert check_training_result(backend, "my_training", params) == (params, None)
        with pytest.raises(ValueError, match="the result of my_training has no leaves"):
            check_training_result(backend, "my_training", {})

    def test_an_auxiliary_result_can_be_anything(self):
        for aux in (None, "log", {"epochs": 3}, LOSS):
            assert check_training_result(backend, "my_training", ((W, W), aux), has_aux=True) == ((W, W), aux)

    @pytest.mark.parametrize(
        ("result", "text"),
        [
            (W, r"returned a ndarray\. With has_aux=True, return \(params, aux\)"),
            ((W, 1, 2), r"returned a tuple of 3\. With has_aux=True"),
            ([W, 1], r"returned a list of 2\. With has_aux=True"),
            (({"w": 1}, W), r"returned a dict, where \['w'\] is an int\. The params are the first of \(params, aux\)"),
        ],
        ids=str,
    )
    def test_with_an_auxiliary_result_the_params_come_first(self, result, text):
        with pytest.raises(TypeError, match=text):
            check_training_result(backend, "my_training", result, has_aux=True)

    def test_the_params_are_noted_where_the_inner_loss_fails(self):
        with pytest.raises(TypeError) as caught, params_noted(MINIMUM, "my_training", (W, LOSS)):
            raise TypeError("unsupported")
        shapes, advice = caught.value.__notes__
        assert advice.startswith("Return only the params, or return (params, aux)")
        assert shapes == (
            "my_training returned a tuple of 2, and inner received params[0] of shape (2,) and params[1] of shape ()."
        )
        with pytest.raises(TypeError) as caught, params_noted(MINIMUM, "my_training", [W]):
            raise TypeError("unsupported")
        [note] = caught.value.__notes__
        assert note == "my_training returned a list of 1, and inner received params[0] of shape (2,)."


class TestArguments:
    def test_keywords_and_defaults_reach_the_inner_loss_under_their_names(self):
        def inner(w, h, X, y, l2=0.0):
            pass

        for args, named in (((1, 2), {"y": 3}), ((1,), {"X": 2, "y": 3}), ((), {"h": 1, "y": 3, "X": 2})):
            bound = bind_arguments(MINIMUM, my_training, inner, args, named)
            assert (bound.hparams, *bound.args, *[bound.shared[k] for k in ("X", "y") if k in bound.shared]) == (
                1,
                2,
                3,
            )
            assert bound.own == {"steps": 100}

    def test_the_inner_loss_need_not_know_what_only_the_training_uses(self):
        def inner(w, h, X):
            pass

        bound = bind_arguments(MINIMUM, my_training, inner, (1, 2), {"steps": 5})
        assert bound == (1, (2,), {}, {"steps": 5, "y": None})

    def test_an_inner_loss_that_takes_all_keywords_receives_all(self):
        bound = bind_arguments(MINIMUM, my_training, lambda w, h, *args, **named: 0, (1, 2, 3), {})
        assert bound == (1, (2, 3), {"y": None}, {})

    def test_a_function_without_a_signature_takes_all(self):
        assert bind_arguments(MINIMUM, max, min, (1, 2), {"default": 3}) == (1, (2,), {"default": 3}, {})

    def test_positional_only_defaults_stay_with_the_training(self):
        def training(h, steps=3, /, *rest, lr=0.1):
            pass

        def inner(w, h, *rest):
            pass

        assert bind_arguments(MINIMUM, training, inner, (1,), {}) == (1, (), {}, {"lr": 0.1})
        assert bind_arguments(MINIMUM, training, inner, (1, 2, 3, 4), {}) == (1, (2, 3, 4), {}, {"lr": 0.1})

    @pytest.mark.parametrize(
        ("args", "named", "text"),
        [
            ((1,), {"y": 2}, r"my_training\(h, X, steps=100, \*, y=None\): missing a required argument: 'X'\.$"),
            ((1, 2), {"Y": 2}, r"my_training\(.*\): got an unexpected keyword argument 'Y'\.$"),
            (
                (1, 2, 3),
                {},
                r"inner\(w, h, X\): too many positional arguments\. .*the arguments of the training: .*names",
            ),
        ],
        ids=["missing", "misspelt", "too many for inner"],
    )
    def test_arguments_that_do_not_fit_are_named(self, args, named, text):
        def inner(w, h, X):
            pass

        with pytest.raises(TypeError, match=text):
            bind_arguments(MINIMUM, my_training, inner, args, named)

    def test_an_argument_under_another_name_is_missing(self):
        with pytest.raises(TypeError, match=r"inner\(w, h, batch\): missing a required argument: 'batch'\. The inner"):
            bind_arguments(MINIMUM, my_training, lambda w, h, batch: 0, (1,), {"X": 2})

    def test_hparams_come_first(self):
        with pytest.raises(TypeError, match="the training: hparams must be the first argument"):
            bind_arguments(MINIMUM, lambda *, h: h, lambda w, h: 0, (), {"h": 1})


class TestDecoration:
    def test_the_inner_loss_is_a_function(self):
        MINIMUM.check_function(my_training)
        with pytest.raises(TypeError, match=r'got a str\. Write implicit_minimizer\(inner, solver="cg"\)'):
            MINIMUM.check_function("cg")

    def test_a_problem_is_not_its_function(self):
        for problem, call in (
            (bl.Problem(my_training, my_training), r"implicit_minimizer\(problem\.inner\)"),
            (bl.FixedPoint(my_training, my_training), r"implicit_fixed_point\(problem\.step\)"),
            (bl.Root(my_training, my_training), r"implicit_root\(problem\.residual\)"),
        ):
            for condition in (MINIMUM, FIXED_POINT, ROOT):
                with pytest.raises(TypeError, match=rf"got a {type(problem).__name__}\. Write {call}\.$"):
                    condition.check_function(problem)

    def test_the_words_follow_the_decorator(self):
        with pytest.raises(
            TypeError, match=r'expected the residual, .* Write implicit_root\(residual, solver="gmres"\)'
        ):
            ROOT.check_function(3)
        with pytest.raises(TypeError, match=r"write @implicit_fixed_point\(step\) above my_training"):
            FIXED_POINT.check_training(my_training, W)

    @pytest.mark.parametrize(
        ("given", "named", "got"),
        [
            ((W,), {}, "a ndarray"),
            ((my_training, 1), {}, "a function, an int"),
            ((), {"X": 2}, "an int"),
            ((), {}, "nothing"),
        ],
        ids=["array", "two", "keyword", "none"],
    )
    def test_the_decorator_takes_one_training(self, given, named, got):
        with pytest.raises(
            TypeError, match=rf"implicit_minimizer\(my_training\) expects a training function, got {got}"
        ):
            MINIMUM.check_training(my_training, *given, **named)
        MINIMUM.check_training(my_training, lambda h: h)

    def test_names(self):
        assert training_name(my_training) == "my_training"
        assert training_name(lambda h: h) == "the training"
        assert training_name(Ridge()) == "Ridge"
