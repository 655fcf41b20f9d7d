"""The L1 norm and the elastic net."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from bilevel.prox.groups import Groups, check_groups, in_features, summed
from bilevel.prox.operator import Given, ProximalOperator, given, reduced, soft_threshold, spread


def l1(penalty: Given = None, *, groups: Sequence[int] | None = None) -> L1:
    """Return the proximal operator of g(w) = Σ exp(λ) |w|, soft thresholding (Parikh & Boyd 2014, §6.5.2).

    Args:
        penalty: λ, the log penalties. None: hparams itself. A string: ``hparams[string]``. A number or an array: a
            constant penalty, without the exponential. The shape is () (shared), (d,) (per feature) or the shape of
            params (per weight); with ``groups``, (number of groups,).
        groups: for each of the d features, the index of its group, whose features share a penalty. Features of group -1
            have no penalty, for example a column of ones for the intercept.

    Returns:
        An operator (v, hparams, step_size) for `bilevel.Proximal`. v has shape (d,) or (d, k).

    Raises:
        TypeError, ValueError: for invalid arguments; when called, if hparams or shapes do not fit.

    >>> import numpy as np
    >>> l1()(np.array([3.0, -0.5]), np.log(2.0) + np.zeros(()), 0.5)
    array([2., 0.])
    """
    return L1(given("penalty", penalty, "numbers >= 0"), check_groups(groups, least=-1))


def elastic_net(l1: Given = "l1", l2: Given = "l2", *, groups: Sequence[int] | None = None) -> ElasticNet:
    """Return the proximal operator of g(w) = Σ exp(λ₁) |w| + ½ Σ exp(λ₂) w² (Parikh & Boyd 2014, §6.5.3).

    Args:
        l1, l2: λ₁ and λ₂, each as ``penalty`` of `l1`. By default, hparams is a dict with these keys.
        groups: as in `l1`, for both penalties.

    Returns:
        An operator, as in `l1`.

    Raises:
        TypeError, ValueError: as in `l1`.

    >>> import numpy as np
    >>> elastic_net(1.0, 1.0)(np.array([3.0, -0.5]), {}, 1.0)
    array([1., 0.])
    """
    return ElasticNet(given("l1", l1, "numbers >= 0"), given("l2", l2, "numbers >= 0"), check_groups(groups, least=-1))


class _Sparse(ProximalOperator):
    """An operator that makes small entries zero."""

    @abstractmethod
    def penalties(self, v: Any, hparams: Any) -> tuple[Any, Any]:
        """Return the L1 and the L2 penalty of each entry of v, in NumPy."""
        raise NotImplementedError

    def support(self, v: Any, hparams: Any, step: Any) -> Any:
        """Return where the result is not zero, as a mask like v, in NumPy."""
        return np.abs(v) > step * self.penalties(v, hparams)[0]


@dataclass(frozen=True)
class L1(_Sparse):
    """See `l1`."""

    values: ClassVar[tuple[str, ...]] = ("penalty",)
    logs: ClassVar[frozenset[str]] = frozenset(values)

    penalty: Any
    groups: Groups | None

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        return soft_threshold(v, step * _spread("penalty", values[0], v, self.groups))

    @override
    def penalties(self, v: Any, hparams: Any) -> tuple[Any, Any]:
        [value] = self._values(v, hparams)
        penalties = np.broadcast_to(_spread("penalty", value, v, self.groups), v.shape)
        return penalties, np.zeros_like(penalties)

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        kept = c * (np.abs(v) > step * _spread("penalty", values[0], v, self.groups))
        return kept, [_reduced(-step * np.sign(v) * kept, values[0], self.groups)]


@dataclass(frozen=True)
class ElasticNet(_Sparse):
    """See `elastic_net`."""

    values: ClassVar[tuple[str, ...]] = ("l1", "l2")
    logs: ClassVar[frozenset[str]] = frozenset(values)

    l1: Any
    l2: Any
    groups: Groups | None

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        one, two = (_spread(name, value, v, self.groups) for name, value in zip(self.values, values, strict=True))
        return soft_threshold(v, step * one) / (1 + step * two)

    @override
    def penalties(self, v: Any, hparams: Any) -> tuple[Any, Any]:
        values = zip(self.values, self._values(v, hparams), strict=True)
        one, two = (np.broadcast_to(_spread(name, value, v, self.groups), v.shape) for name, value in values)
        return one, two

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        one, two = (_spread(name, value, v, self.groups) for name, value in zip(self.values, values, strict=True))
        kept = c * (np.abs(v) > step * one) / (1 + step * two)
        result = self.apply(v, step, *values)
        products = -step * np.sign(v) * kept, -step * result * kept
        return kept, [_reduced(x, value, self.groups) for x, value in zip(products, values, strict=True)]


def _spread(name: str, value: Any, v: Any, groups: Groups | None) -> Any:
    return spread(name, in_features(name, value, v, groups), v)


def _reduced(product: Any, value: Any, groups: Groups | None) -> Any:
    return reduced(product, value) if groups is None or not value.ndim else summed(product, groups, len(value))
