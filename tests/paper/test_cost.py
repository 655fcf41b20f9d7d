"""What a hypergradient costs: the measurement runs, and is stored."""

import pytest
from paper_systems import check_stored

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def command(command):
    return [*command, "--only", "identity", "neumann 20"]


def test_more_products_cost_more(histories):
    few, many = (history["result"] for history in histories.values())
    assert few["hyperparameters"] == many["hyperparameters"] == 64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
    assert many["gradients"] > few["gradients"] > 1


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)
