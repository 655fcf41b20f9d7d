"""A language model with tuned regularizers: the paper's table 4 in small, with its report."""

import pytest
from frameworks import relative_error
from paper_systems import check_stored, report_of

import bilevel as bl

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def test_the_hypergradient_agrees_with_the_dense_hessian_under_the_same_noise(system):
    torch.manual_seed(0)
    net = system.LanguageModel(5, 2).double()
    regularizers = system.Regularizers({**system.HIGH, "output": 0.5}, 2, many=True)
    regularizers = regularizers.double()
    words, held_out = torch.randint(5, (3, 5)), torch.randint(5, (4, 5))
    damping, names = 0.5, [name for name, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]

    def loss(flat):
        torch.manual_seed(1)
        params = {n: f.view_as(p) for n, f, p in zip(names, flat.split(sizes), net.parameters(), strict=True)}
        call = torch.func.functional_call
        return system.inner_loss(lambda words, noise: call(net, params, (words, noise)), regularizers, words)

    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach().requires_grad_()
    hessian = torch.autograd.functional.hessian(loss, flat)
    outer = torch.autograd.grad(system.outer_loss(net, held_out), net.parameters())
    adjoint = torch.linalg.solve(hessian + damping * torch.eye(len(flat)), torch.cat([g.flatten() for g in outer]))
    (grad,) = torch.autograd.grad(loss(flat), flat, create_graph=True)
    expected = torch.autograd.grad(-(grad @ adjoint.detach()), list(regularizers.parameters()))

    torch.manual_seed(1)
    hparams = dict(regularizers.named_parameters())
    solver = {"name": "exact", "damping": damping}
    bilevel_torch.backward(
        system.inner_loss(net, regularizers, words), system.outer_loss(net, held_out), net.parameters(), hparams,
        solver=solver,
    )  # fmt: skip
    for raw, gradient in zip(regularizers.parameters(), expected, strict=True):
        assert relative_error(raw.grad, gradient) < 1e-8


def test_the_counts_are_those_of_the_page(system):
    net, regularizers = system.LanguageModel(2000, 128), system.Regularizers(system.HIGH, 128, many=True)
    assert sum(p.numel() for p in regularizers.parameters()) == 65_794
    assert sum(p.numel() for p in net.parameters()) == 390_096


def test_the_derivative_of_the_whole_training_agrees_with_central_differences(system):
    torch.manual_seed(0)
    sizes = system.FAST | {"train": 60, "held_out": 30, "window": 5, "batch": 2, "epochs": 2, "vocabulary": 8}
    parts = system.cut(sizes, *[[str(i * i % 17) for i in range(200)]] * 2)
    net = system.LanguageModel(8, 3).double()
    net.embedding.weight.data *= 10  # Adam magnifies rounding where gradients are near zero
    training, batches = system.whole_training(net, parts, sizes)
    start = system.Regularizers(system.HIGH, 3, many=False).double().state_dict()
    rates, first = {name: raw.expand(2).clone() for name, raw in start.items()}, training.step.init()

    def end(rates):
        torch.manual_seed(1)
        state = first
        for batch in batches:
            state = training.step(state, rates, batch)
        return float(training.outer(state, rates).detach())

    torch.manual_seed(1)
    found = bl.metagradient(training, first, rates, batches).grad
    assert {number for number, _ in batches} == {0, 1}
    expected = []
    for name, rate in rates.items():
        for change in 1e-3 * torch.eye(2, dtype=torch.float64):
            expected += [(end(rates | {name: rate + change}) - end(rates | {name: rate - change})) / 2e-3]
    assert relative_error(torch.cat([found[name] for name in rates]), expected) < 1e-3


def test_tuned_regularizers_move_and_the_language_model_learns(system, histories):
    variants = system.VARIANTS | system.SEARCHES
    assert set(histories) == {f"{variant}-0" for variant in variants | system.DERIVED}
    for history in (histories[f"{variant}-0"] for variant in variants):
        rows = history["rows"]
        assert rows[-1]["choose"] < rows[0]["choose"] < system.FAST["vocabulary"]
        assert history["result"]["choose"] == min(row["choose"] for row in rows)
    for name in ("many", "few_late", "many_late"):  # tuned: away from the start
        assert abs(histories[f"{name}-0"]["rows"][-1]["output_rate"] - system.HIGH["output"]) > 1e-3
    assert histories["none-0"]["rows"][-1]["output_rate"] == pytest.approx(system.HIGH["output"])


def test_a_late_tuning_starts_as_no_tuning_does(system, histories):
    half = system.FAST["epochs"] // 2
    for name in ("few_late", "many_late"):
        rows = histories[f"{name}-0"]["rows"]
        assert rows[half - 1]["test"] == histories["none-0"]["rows"][half - 1]["test"]
        assert rows[half]["test"] != histories["none-0"]["rows"][half]["test"]


def test_a_paused_training_is_the_same_training(system, tmp_path):
    words = [str(i * i % 17) for i in range(900)]
    sizes = system.FAST | {"train": 300, "held_out": 60}
    parts = system.cut(sizes, words, words)

    def rows(*pauses):
        torch.manual_seed(0)
        training = system.Training(parts, sizes, system.Regularizers(system.HIGH, sizes["size"], False))
        for epochs in pauses:
            training.go(epochs, tmp_path / "checkpoint")
        return training.rows

    assert rows(1, 2) == rows(3)


def test_halving_goes_on_with_the_best(histories, system):
    trials = histories["halving-0"]["trials"]
    assert [trial["epochs"] for trial in trials] == [n for kept, n in system.SEARCHES["halving"] for _ in range(kept)]
    first = [trial["choose"] for trial in trials[:8]]
    assert trials[8]["choose"] <= min(first)
    assert histories["random-0"]["result"]["choose"] == min(
        trial["choose"] for trial in histories["random-0"]["trials"]
    )


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


def test_the_report_has_a_table_and_a_picture(system, histories, tmp_path):
    assert "| --- |" in report_of(system, histories, tmp_path)
