"""Both transposed products of a linearized map at once."""

import numpy as np
import pytest

from bilevel.linearization import JointProduct, LinearizedMap


def at(joint_of_params, joint_of_hparams):
    """A map with products by 2 and 3, and with other products in its joint one."""

    def vjp_params(v):
        return 2 * v

    def vjp_hparams(v):
        return 3 * v

    joint = JointProduct((vjp_params, vjp_hparams), lambda v: (joint_of_params * v, joint_of_hparams * v))
    return LinearizedMap(np.zeros(1), vjp_params, vjp_hparams, joint=joint)


class TestVjp:
    def test_the_joint_product_is_taken(self):
        assert at(5.0, 7.0).vjp(1.0) == (5.0, 7.0)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"vjp_params": lambda v: -v}, (-1.0, 3.0)),
            ({"vjp_hparams": lambda v: None}, (2.0, None)),
            ({"joint": None}, (2.0, 3.0)),
        ],
    )
    def test_a_replaced_product_counts(self, changes, expected):
        assert at(5.0, 7.0)._replace(**changes).vjp(1.0) == expected
