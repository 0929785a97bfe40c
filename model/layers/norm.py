"""Root mean square norm, and what VL-01 does around it: residuals before, a gate after.

T tokens, D width.
"""

import torch
from torch import Tensor, nn

from model.config import Residual
from model.layers.activation import sigmoid
from model.layers.dispatch import kernels
from model.layers.linear import empty_weight


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in fp32."""
    if fast := kernels(x_TD):
        return fast.rms_norm(x_TD, weight_D, eps)
    x_fp32 = x_TD.float()
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return weight_D * (x_fp32 * scale).to(x_TD.dtype)


def residual_norm(
    x_TD: Tensor, y_TD: Tensor, residual: Residual, weight_D: Tensor, eps: float
) -> Tensor:
    """rms_norm(alpha * x + beta * y): VL-01 keeps the normed sum only."""
    if fast := kernels(x_TD):
        return fast.residual_norm(x_TD, y_TD, residual.alpha, residual.beta, weight_D, eps)
    return rms_norm(residual.alpha * x_TD + residual.beta * y_TD, weight_D, eps)


def gated_norm(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """sigmoid(gate) * rms_norm(x), the output of lightning attention."""
    if fast := kernels(x_TD):
        return fast.gated_norm(x_TD, gate_TD, weight_D, eps)
    return sigmoid(gate_TD) * rms_norm(x_TD, weight_D, eps)


class RMSNorm(nn.Module):
    def __init__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = empty_weight(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)
