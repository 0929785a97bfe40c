"""Mixture of experts: every token goes through its top experts, and their answers are weighed.

T tokens, E experts, K experts per token, D hidden, F inner dimensions.
"""

import torch
from torch import Tensor, nn

from model.config import Residual, TextConfig
from model.layers.activation import silu
from model.layers.dispatch import kernels, product_kernels
from model.layers.linear import Linear, Quantization, empty_weight, linear


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts of each token, int64 [T, K], and their weights, fp32 [T, K], which sum to 1."""
    if fast := kernels(logits_TE):
        return fast.route(logits_TE, top_k)
    weights_TK, experts_TK = torch.softmax(logits_TE.float(), dim=-1).topk(top_k, dim=-1)
    return experts_TK, weights_TK / weights_TK.sum(dim=-1, keepdim=True)


def experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w13_EFD: Tensor,
    w13_scale_EF1: Tensor | None,
    w2_EDF: Tensor,
    w2_scale_ED1: Tensor | None,
    *,
    residual: Residual | None = None,
    quantize_x: bool = False,
) -> Tensor:
    """The sum over a token's experts of weight * w2(silu(w1 x) * (w3 x)), added to x by `residual`
    if there is one; [T, D] in the dtype of x.

    w13_EFD holds the rows of w1 (gate), then those of w3 (up): [E, 2F, D]. The scales are None
    when the weights are not quantized; for quantize_x see `linear`.
    """
    if fast := product_kernels(x_TD, w13_EFD.shape[2], w2_EDF.shape[2]):
        return fast.experts(
            x_TD, experts_TK, weights_TK, w13_EFD, w13_scale_EF1, w2_EDF, w2_scale_ED1,
            residual=residual, quantize_x=quantize_x,
        )  # fmt: skip
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    order = experts_TK.flatten().argsort(stable=True)
    counts = experts_TK.flatten().bincount(minlength=len(w13_EFD)).tolist()
    for expert, picks in enumerate(order.split(counts)):
        if not len(picks):
            continue
        tokens = picks // experts_TK.shape[1]
        w13_scale = None if w13_scale_EF1 is None else w13_scale_EF1[expert]
        w2_scale = None if w2_scale_ED1 is None else w2_scale_ED1[expert]
        both = linear(x_TD[tokens], w13_EFD[expert], w13_scale, quantize_x=quantize_x)
        gate, up = both.chunk(2, dim=-1)
        out = linear(silu(gate) * up, w2_EDF[expert], w2_scale, quantize_x=quantize_x)
        # A token meets an expert once at most, so the order of its sum is that of the experts.
        y_TD.index_add_(0, tokens, out * weights_TK.flatten()[picks, None])
    y_TD = y_TD.to(x_TD.dtype)
    return y_TD if residual is None else residual.alpha * x_TD + residual.beta * y_TD


class MixtureOfExperts(nn.Module):
    """Gate and experts of one layer. The gate is never quantized."""

    def __init__(
        self,
        text: TextConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: Quantization,
    ) -> None:
        super().__init__()
        quantized = quantization != "none"
        self.quantize_x = quantization == "int8-dynamic"
        count, hidden, inner = text.num_experts, text.hidden_size, text.intermediate_size
        weight_dtype = torch.int8 if quantized else dtype
        self.top_k, self.residual = text.experts_per_token, text.moe_residual
        self.gate = Linear(hidden, count, dtype=dtype, device=device)
        self.w13 = empty_weight(count, 2 * inner, hidden, dtype=weight_dtype, device=device)
        self.w2 = empty_weight(count, hidden, inner, dtype=weight_dtype, device=device)
        self.w13_scale = self.w2_scale = None
        if quantized:
            scale = {"dtype": torch.bfloat16, "device": device}
            self.w13_scale = empty_weight(count, 2 * inner, 1, **scale)
            self.w2_scale = empty_weight(count, hidden, 1, **scale)

    def forward(self, x_TD: Tensor) -> Tensor:
        """x and what its experts make of it, added as `residual` says."""
        experts_TK, weights_TK = route(self.gate(x_TD), self.top_k)
        return experts(
            x_TD, experts_TK, weights_TK, self.w13, self.w13_scale, self.w2, self.w2_scale,
            residual=self.residual, quantize_x=self.quantize_x,
        )  # fmt: skip
