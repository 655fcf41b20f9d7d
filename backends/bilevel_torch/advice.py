"""Ways out of PyTorch's errors about gradients."""

DIFFERENCES = 'differentiate once, by bl.Problem(inner, outer, curvature="finite-differences").'
NOT_REENTRANT = "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."

TWICE = "A Hessian-vector product differentiates twice, and this operation has no second derivative."
COMPILED = (
    "A Hessian-vector product differentiates twice, and a compiled module differentiates only once. Compute the losses "
    "within torch.compiler.set_stance('force_eager'), or by the uncompiled module. (A compiled module keeps it as "
    "_orig_mod, and Fabric's wrapper as module.)"
)

BY_OPERATION = {
    ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"): (
        "Compute the losses within torch.nn.attention.sdpa_kernel(SDPBackend.MATH). For a model of transformers, pass "
        'attn_implementation="eager".'
    ),
    ("cudnn_rnn", "miopen_rnn"): "Compute the losses within torch.backends.cudnn.flags(enabled=False).",
    ("cdist",): 'Pass compute_mode="use_mm_for_euclid_dist" to torch.cdist.',
    ("embedding_bag",): "Use torch.nn.Embedding, and take the sum or mean of its output: embedding(i).mean(1).",
    ("segment_reduce",): (
        "Sum by an index: torch.Tensor.scatter_reduce, or in PyTorch Geometric index= in place of ptr=."
    ),
}
"""Advice by a part of the name of an operation without a second derivative."""

BY_PHRASE = {
    ("does not currently support double backward", "create_graph=False"): f"{COMPILED} Or {DIFFERENCES}",
    ("modified by an inplace operation",): (
        "A tensor changed in place between the losses and this call, most often the params by optimizer.step(). Take "
        "the step before both losses are computed, or after this call. If a forward pass changes its weights "
        "(Embedding(max_norm=...), clipping), the second loss changes a tensor of the first one. Change the weights "
        "after the step instead."
    ),
    ("backward through the graph a second time",): (
        "An earlier backward() has freed the graph of a loss. Compute the hypergradient first, call "
        "backward(retain_graph=True) there, or compute the loss again."
    ),
    ("call `fabric.backward(loss)`",): (
        "Fabric requires its backward() for the training step. Compute the two losses of a hypergradient with the "
        "unwrapped modules, which Fabric's wrappers keep as module, within fabric.autocast()."
    ),
    ("use_reentrant=True",): NOT_REENTRANT,
    ("got mixed torch.Tensor and DTensor",): (
        "A loss computes with DTensors and plain tensors together. If only some parameters are DTensors, sum each kind "
        "by itself, and convert the sum of the DTensors: sum((p**2).sum() for p in dtensors).full_tensor(). Then add "
        "both sums. Or shard all parameters: fully_shard(module)."
    ),
}
"""Advice by the phrases that identify other errors."""

FOREIGN = (
    "This error comes from a hook, an autograd.Function or a checkpoint while bilevel differentiates. A Hessian-vector "
    "product differentiates twice, and runs backward hooks several times. If they do not support it, compute the "
    f"losses by a module without them (for example, not by the GradSampleModule of opacus), or {DIFFERENCES}"
)


def advice(error: str) -> str | None:
    """Return the way out of an error of `torch.autograd.grad`. None: unknown."""
    for phrases, way_out in BY_PHRASE.items():
        if any(phrase in error for phrase in phrases):
            return way_out
    if not any(phrase in error for phrase in ("is not implemented", "ouble backward", "no autograd formula")):
        return None
    for names, way_out in BY_OPERATION.items():
        if any(name in error for name in names):
            return f"{TWICE} {way_out} Or {DIFFERENCES}"
    return f"{TWICE} Write it with other operations, or {DIFFERENCES}"
