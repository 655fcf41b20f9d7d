"""The learned augmentation of the paper."""

import pytest
from paper_systems import check_augmentation, check_stored, paper, report_of

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.mark.parametrize(("channels", "expected"), [(1, 6497), (3, 6659)])
def test_augmentation_has_as_many_parameters_as_the_papers_and_starts_as_the_identity(channels, expected):
    augment = paper("models").Augmentation(channels)
    assert sum(parameter.numel() for parameter in augment.parameters()) == expected
    x = torch.rand(2, channels, 8, 8)
    assert torch.equal(augment(x, torch.randn(2)), x)


def test_network_that_is_trained_has_as_many_weights_as_documented():
    assert sum(parameter.numel() for parameter in paper("models").small_cnn(1, 28).parameters()) == 28938


def test_tuned_augmentations_lower_the_validation_loss(histories):
    loss = {name: history["result"]["val_loss"] for name, history in histories.items()}
    for variant in ("identity", "neumann", "unrolled", "automatic"):
        assert loss[f"{variant}-0"] < loss["none-0"]
        assert histories[f"{variant}-0"]["result"]["change"] > 0.01


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


def test_hypergradient_agrees_with_the_exact_one():
    torch.manual_seed(0)
    augment = paper("models").Augmentation(1, filters=2).double()
    torch.nn.init.normal_(augment.last.weight)
    check_augmentation(augment, torch.randn(12).double())


def test_the_report_has_a_table_and_a_picture(system, histories, tmp_path):
    assert report_of(system, histories, tmp_path).count("\n| ") == len(histories) + 2
