"""Losses with PyTorch, and with packages that build on it."""

import torch
from torch import nn
from torch.func import functional_call

from benchmarks.compatibility.rows import Loss, Made, Rows

ROWS = Rows()
EAGER = '`attn_implementation="eager"`'
MATH = "`sdpa_kernel(SDPBackend.MATH)`"


def draw(*shape: int) -> torch.Tensor:
    """Return random numbers, the same at each run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def of_module(net: nn.Module, *args: object, **kwargs: object) -> Made:
    """Return the mean square of a module's output, and the parameters that require gradients."""
    parameters = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        out = functional_call(net, params, args, kwargs)
        return (out[0] if isinstance(out, tuple) else getattr(out, "logits", out)).square().mean()

    return loss, parameters


def at(loss: Loss, *shape: int) -> Made:
    """Return a loss of ``params["w"]``, at random numbers."""
    return loss, {"w": draw(*shape)}


def attention(w: torch.Tensor) -> torch.Tensor:
    """Return the mean square of an attention of 2 heads."""
    q, k, v = w
    return nn.functional.scaled_dot_product_attention(q, k, v).square().mean()


@ROWS.add("torch", "`scaled_dot_product_attention`", "raises", MATH)
def _sdpa() -> Made:
    return at(lambda p: attention(p["w"]), 3, 1, 2, 5, 4)


@ROWS.add("torch", "the same, with the math kernel", "right")
def _sdpa_math() -> Made:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(p["w"])

    return at(loss, 3, 1, 2, 5, 4)


@ROWS.add("torch", "`torch.compile`", "raises", "the module before `compile`")
def _compile() -> Made:
    compiled = torch.compile(lambda w: w.tanh().square().sum(), backend="aot_eager")
    return at(lambda p: compiled(p["w"]), 4)


@ROWS.add("torch", "`nn.LSTM` on a CPU", "right")
def _lstm() -> Made:
    return of_module(nn.LSTM(3, 4, num_layers=2).double(), draw(5, 2, 3))


@ROWS.add("torch", "`nn.BatchNorm1d`", "right")
def _batch_norm() -> Made:
    return of_module(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double(), draw(8, 3))


@ROWS.add("torch", "`nn.EmbeddingBag`", "raises", "`embedding(index).mean(1)`")
def _embedding_bag() -> Made:
    index = torch.tensor([[0, 1], [2, 3]])
    return at(lambda p: nn.functional.embedding_bag(index, p["w"]).pow(4).sum(), 5, 3)


@ROWS.add("torch", "the same, as `embedding(index).mean(1)`", "right")
def _embedding_mean() -> Made:
    index = torch.tensor([[0, 1], [2, 3]])
    return at(lambda p: nn.functional.embedding(index, p["w"]).mean(1).pow(4).sum(), 5, 3)


@ROWS.add("torch", "`torch.cdist`, up to 25 rows", "raises", '`compute_mode="use_mm_for_euclid_dist"`')
def _cdist() -> Made:
    return at(lambda p: torch.cdist(p["w"], draw(7, 3)).sum(), 6, 3)


@ROWS.add("torch", 'the same, `compute_mode="use_mm_for_euclid_dist"`', "right")
def _cdist_by_product() -> Made:
    return at(lambda p: torch.cdist(p["w"], draw(7, 3), compute_mode="use_mm_for_euclid_dist").sum(), 6, 3)


@ROWS.add("torch", "`ctc_loss`", "raises", "finite differences")
def _ctc() -> Made:
    lengths = torch.tensor([6]), torch.tensor([2])
    targets = torch.tensor([[1, 2]])
    return at(lambda p: nn.functional.ctc_loss(p["w"].log_softmax(-1), targets, *lengths), 6, 1, 4)


@ROWS.add("torch", "`norm()` of a vector of zeros", "nan", "`(x.square().sum() + eps).sqrt()`")
def _norm() -> Made:
    return lambda p: p["w"].norm() + p["w"].sum(), {"w": torch.zeros(3, dtype=torch.float64)}


@ROWS.add("torch", "the same, as `(x.square().sum() + eps).sqrt()`", "right")
def _root() -> Made:
    return lambda p: (p["w"].square().sum() + 1e-4).sqrt() + p["w"].sum(), {"w": torch.zeros(3, dtype=torch.float64)}


@ROWS.add("torch", "`parametrizations.spectral_norm` in train mode", "wrong", "`eval()` after some passes")
def _spectral_norm() -> Made:
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 1))
    return of_module(net.double(), draw(6, 4))


@ROWS.add("torch", "the same in eval mode", "right")
def _spectral_norm_eval() -> Made:
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 1)).double()
    for _ in range(100):
        net(draw(6, 4))
    return of_module(net.eval(), draw(6, 4))


@ROWS.add("torch", "`FakeQuantize`", "wrong", "tune without it")
def _quantize() -> Made:
    from torch.ao.quantization import FakeQuantize

    fake = FakeQuantize(quant_min=0, quant_max=15)
    fake(draw(4, 3).float())
    fake.disable_observer()

    return at(lambda p: (draw(6, 4) @ fake(p["w"].float()).double()).tanh().square().mean(), 4, 3)


def llama(**options: object) -> nn.Module:
    """Return a tiny Llama in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes, **options)).double()


def bert(**options: object) -> nn.Module:
    """Return a tiny Bert in float64, without dropout."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=11, **sizes, **options)).double().eval()


TOKENS = torch.tensor([[1, 5, 2, 7, 3]])


@ROWS.add("transformers", "Llama with the default attention", "raises", EAGER)
def _llama() -> Made:
    return of_module(llama(), TOKENS)


@ROWS.add("transformers", f"Llama with {EAGER}", "right")
def _llama_eager() -> Made:
    return of_module(llama(attn_implementation="eager"), TOKENS)


@ROWS.add("transformers", f"Bert with {EAGER}", "right")
def _bert_eager() -> Made:
    return of_module(bert(attn_implementation="eager"), TOKENS)


def adapted(**options: object) -> Made:
    """Return a tiny Llama with adapters at random weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return of_module(get_peft_model(llama(attn_implementation="eager"), config).double(), TOKENS)


@ROWS.add("peft", "LoRA", "right")
def _lora() -> Made:
    return adapted()


@ROWS.add("peft", "DoRA", "wrong", "LoRA")
def _dora() -> Made:
    return adapted(use_dora=True)


EDGES = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])


@ROWS.add("torch_geometric", "`GCNConv`", "right")
def _gcn() -> Made:
    from torch_geometric.nn import GCNConv

    return of_module(GCNConv(3, 2).double(), draw(4, 3), EDGES)


@ROWS.add("torch_geometric", "`GATConv`", "right")
def _gat() -> Made:
    from torch_geometric.nn import GATConv

    return of_module(GATConv(3, 2).double(), draw(4, 3), EDGES)


@ROWS.add("torch_geometric", "aggregations with `ptr=`", "raises", "`index=`")
def _aggregation_ptr() -> Made:
    from torch_geometric.nn import MaxAggregation

    return at(lambda p: MaxAggregation()(p["w"], ptr=torch.tensor([0, 2, 4])).pow(4).sum(), 4, 3)


@ROWS.add("torch_geometric", "the same with `index=`", "right")
def _aggregation_index() -> Made:
    from torch_geometric.nn import MaxAggregation

    return at(lambda p: MaxAggregation()(p["w"], index=torch.tensor([0, 0, 1, 1])).pow(4).sum(), 4, 3)


@ROWS.add("torchdiffeq", "`odeint`", "right")
def _odeint() -> Made:
    from torchdiffeq import odeint

    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    return at(lambda p: odeint(lambda t, y: (p["w"] @ y).tanh(), draw(3), times, rtol=1e-9, atol=1e-9)[-1].sum(), 3, 3)


@ROWS.add("torchdiffeq", "`odeint_adjoint`", "wrong", "`odeint`")
def _odeint_adjoint() -> Made:
    from torchdiffeq import odeint_adjoint

    times = torch.linspace(0, 1, 4, dtype=torch.float64)

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        field = lambda t, y: (p["w"] @ y).tanh()  # noqa: E731
        return odeint_adjoint(field, draw(3), times, adjoint_params=(p["w"],))[-1].sum()

    return at(loss, 3, 3)


class Kernel(nn.Module):
    """The entries of an RBF kernel."""

    def __init__(self, ard: int | None) -> None:
        from gpytorch.kernels import RBFKernel

        super().__init__()
        self.kernel = RBFKernel(ard_num_dims=ard)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x).to_dense()


@ROWS.add("gpytorch", "`RBFKernel` with one length scale", "wrong", "`ard_num_dims=`")
def _rbf() -> Made:
    return of_module(Kernel(None).double(), draw(5, 2))


@ROWS.add("gpytorch", "`RBFKernel(ard_num_dims=2)`", "right")
def _rbf_ard() -> Made:
    return of_module(Kernel(2).double(), draw(5, 2))


@ROWS.add("e3nn", "`FullyConnectedTensorProduct`, spherical harmonics", "right")
def _e3nn() -> Made:
    from e3nn import o3

    product = o3.FullyConnectedTensorProduct("1x1o", "1x0e+1x1o", "1x0e+1x1o").double()
    return of_module(product, draw(4, 3), o3.spherical_harmonics("1x0e+1x1o", draw(4, 3), normalize=True))


@ROWS.add("entmax", "`sparsemax`", "right")
def _sparsemax() -> Made:
    from entmax import sparsemax

    return at(lambda p: sparsemax(p["w"], dim=-1).pow(3).sum(), 2, 5)


@ROWS.add("entmax", "`entmax15_loss`", "wrong", "finite differences")
def _entmax_loss() -> Made:
    from entmax import entmax15_loss

    return at(lambda p: entmax15_loss(p["w"], torch.tensor([0, 3])).sum(), 2, 5)


@ROWS.add("snntorch", "`Leaky`", "wrong", "no way out: its gradient is no derivative")
def _leaky() -> Made:
    import snntorch

    leaky = snntorch.Leaky(beta=0.9)

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        membrane, total = leaky.init_leaky(), 0.0
        for current in draw(6, 3) @ p["w"]:
            spike, membrane = leaky(current, membrane)
            total = total + spike + 0.1 * membrane
        return total.square().mean()

    return at(loss, 3, 4)


def metric(name: str, **options: object) -> Made:
    """Return a loss of pytorch-metric-learning of ten vectors."""
    from pytorch_metric_learning import losses

    function, labels = getattr(losses, name)(**options), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 0])
    return at(lambda p: function(p["w"], labels), 10, 4)


@ROWS.add("pytorch_metric_learning", "`TripletMarginLoss`, up to 25 rows", "raises", "more rows, or `NTXentLoss`")
def _triplet() -> Made:
    return metric("TripletMarginLoss")


@ROWS.add("pytorch_metric_learning", "`NTXentLoss`", "right")
def _ntxent() -> Made:
    return metric("NTXentLoss")


@ROWS.add("pytorch_metric_learning", "`CircleLoss`", "wrong", "another loss")
def _circle() -> Made:
    return metric("CircleLoss")
