"""Pictures of tuned estimators show what the models found."""

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn")
plt = pytest.importorskip("matplotlib.pyplot")
tuned = pytest.importorskip("bilevel.sklearn")


@pytest.fixture(autouse=True)
def _no_screen():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def data(features=8):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, features))
    return X, 2 * X[:, 0] - X[:, 1] + rng.standard_normal(40)


def test_penalties_of_all_features():
    model = tuned.TunedRidge(cv=3).fit(*data())
    ax = tuned.plot_penalties(model)
    points = np.concatenate([np.asarray(part.get_offsets()) for part in ax.collections])
    order = np.argsort(points[:, 1])
    assert np.allclose(points[order, 1], np.sort(model.alphas_))
    assert np.allclose(points[order, 0], abs(model.coef_)[np.argsort(model.alphas_)])
    assert [text.get_text() for text in ax.texts] == [str(j) for j in range(8)]


def test_coefficients_of_zero_are_a_group_of_their_own():
    model = tuned.TunedLasso(cv=3).fit(*data(40))
    ax = tuned.plot_penalties(model)
    kept, zero = (np.asarray(part.get_offsets()) for part in ax.collections)
    assert len(kept) == np.count_nonzero(model.coef_)
    assert len(zero) == 40 - len(kept) > 0
    assert zero[:, 0].max() < kept[:, 0].min()
    assert not ax.texts  # too many for labels


def test_the_search_after_the_path():
    model = tuned.TunedLasso(cv=3).fit(*data())
    ax = plt.subplots()[1]
    assert tuned.plot_search(model, ax) is ax
    path, search = (line.get_ydata() for line in ax.lines)
    assert np.array_equal(path, model.path_errors_)
    assert np.array_equal(search, [evaluation.value for evaluation in model.history_])
    assert len(tuned.plot_search(tuned.TunedRidge(cv=3).fit(*data())).lines) == 1


def test_a_model_without_any_coefficient():
    X, _ = data(10)
    model = tuned.TunedLasso(cv=3).fit(X, np.random.default_rng(1).standard_normal(40))
    assert not model.coef_.any()
    ax = tuned.plot_penalties(model)
    assert not ax.texts
    assert [label.get_text() for label in ax.get_xticklabels(minor=True)] == ["0"]


def test_other_objects():
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(tuned.TunedRidge(cv=3)).fit(*data())
    for plot in (tuned.plot_penalties, tuned.plot_search):
        with pytest.raises(TypeError, match=r"got Pipeline. From a pipeline, pass the step: pipeline\[-1\]"):
            plot(pipeline)
        with pytest.raises(TypeError, match=r"expected an estimator of bilevel\.sklearn, got Ridge"):
            plot(Ridge().fit(*data()))
        plot(pipeline[-1])


def test_a_model_without_a_fit():
    for plot in (tuned.plot_penalties, tuned.plot_search):
        with pytest.raises(sklearn.exceptions.NotFittedError):
            plot(tuned.TunedRidge())
