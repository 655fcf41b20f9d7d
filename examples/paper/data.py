"""The data sets of the paper's experiments from a folder, and small stand-ins for them.

``mnist/`` holds the usual idx files (or those of the first 10,000 images, ``train10k-…``), ``cifar10_7k/`` an npz with
``x_train`` and so on, ``boston/`` a csv file with the target in the last column, ``wikitext2_validtest/`` text files,
``a9a/`` LIBSVM's a9a and a9a.t.
"""

import gzip
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse


class Images(NamedTuple):
    """Images of shape (n, channels, height, width), from 0 to 1 in float32, and their labels of shape (n,)."""

    x: np.ndarray
    y: np.ndarray


class Split(NamedTuple):
    """To train and validate on, and to test on; ``name`` says which data they are."""

    name: str
    train: Images
    test: Images


def mnist(folder: Path | None) -> Split:
    """Return MNIST, or scikit-learn's digits of 8 x 8 pixels."""
    if folder is None:
        return _digits()
    found = []
    for part in ("train", "t10k"):
        arrays = []
        for kind in ("images-idx3", "labels-idx1"):
            names = [f"{part}-{kind}-ubyte.gz", f"{part}10k-{kind}-ubyte.gz"]
            # A folder may hold the labels of all images, and the images of the first 10,000.
            if not (folder / "mnist" / f"{part}-images-idx3-ubyte.gz").exists():
                names = names[1:]
            path = _find(folder / "mnist", names)
            with gzip.open(path) as file:
                raw = file.read()
            dims = [int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, raw[3] + 1)]
            arrays.append(np.frombuffer(raw, np.uint8, offset=4 * len(dims) + 4).reshape(dims))
        found.append(Images(arrays[0][:, None].astype(np.float32) / 255, arrays[1].astype(np.int64)))
    return Split("MNIST", *found)


def cifar10(folder: Path | None) -> Split:
    """Return 7,000 images of CIFAR-10, or scikit-learn's digits in random colours, of 8 x 8 pixels."""
    if folder is None:
        grey = _digits()
        colours = np.random.default_rng(0).uniform(0.2, 1.0, (len(grey.train.y) + len(grey.test.y), 3, 1, 1))
        parts = np.split(colours.astype(np.float32), [len(grey.train.y)])
        coloured = (Images(part.x * colour, part.y) for part, colour in zip(grey[1:], parts, strict=True))
        return Split("coloured digits", *coloured)
    path = _find(folder / "cifar10_7k", ["*.npz"])
    with np.load(path) as arrays:
        x, y, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))

    def images(x: np.ndarray, y: np.ndarray) -> Images:
        return Images(np.moveaxis(x, -1, 1).astype(np.float32) / 255, y.astype(np.int64).reshape(-1))

    return Split("CIFAR-10 (7,000 JPEG images)", images(x, y), images(x_test, y_test))


def housing(folder: Path | None) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the name, features and targets of Boston housing, or of scikit-learn's diabetes; neither is scaled."""
    if folder is None:
        from sklearn.datasets import load_diabetes

        x, y = load_diabetes(return_X_y=True, scaled=False)
        return "diabetes", x, y
    table = np.loadtxt(_find(folder / "boston", ["*.csv"]), delimiter=",", skiprows=1, quotechar='"')
    return "Boston housing", table[:, :-1], table[:, -1]


def words(folder: Path | None) -> tuple[str, list[str], list[str]]:
    """Return the name and the words of two texts: WikiText-2's, or the descriptions of scikit-learn's data sets."""
    if folder is None:
        from sklearn import datasets

        loaders = (datasets.load_breast_cancer, datasets.load_digits, datasets.load_iris, datasets.load_wine)
        text = " ".join(load().DESCR for load in (*loaders, datasets.load_diabetes)).split()
        return "descriptions of data sets", text[: 2 * len(text) // 3], text[2 * len(text) // 3 :]
    texts = (_find(folder / "wikitext2_validtest", [name]).read_text("utf-8") for name in ("valid.txt", "test.txt"))
    return ("WikiText-2 (validation and test files)", *(text.replace("\n", " <eos> ").split() for text in texts))


def adult(folder: Path | None) -> tuple[str, Any, Any, Any, Any]:
    """Return the name, sparse features and labels to train on and to test, of a9a or scikit-learn's breast cancer."""
    if folder is None:
        from sklearn.datasets import load_breast_cancer

        x, y = load_breast_cancer(return_X_y=True)
        x = sparse.csr_array((x - x.mean(0)) / x.std(0))[np.random.default_rng(0).permutation(len(y))]
        y = y[np.random.default_rng(0).permutation(len(y))]
        return "breast cancer", x[:400], y[:400], x[400:], y[400:]
    from sklearn.datasets import load_svmlight_files

    files = [str(_find(folder / "a9a", [name])) for name in ("a9a", "a9a.t")]
    x, y, x_test, y_test = load_svmlight_files(files, n_features=123)
    return "a9a", sparse.csr_array(x), y > 0, sparse.csr_array(x_test), y_test > 0


def _digits() -> Split:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order] / 16).reshape(-1, 1, 8, 8).astype(np.float32), y[order].astype(np.int64)
    return Split("scikit-learn's digits", Images(x[:1300], y[:1300]), Images(x[1300:], y[1300:]))


def _find(folder: Path, names: list[str]) -> Path:
    for name in names:
        for path in sorted(folder.glob(name)):
            return path
    raise FileNotFoundError(f"{folder}: no {' or '.join(names)}. --data DIR is the folder above it.")
