"""Matrix products over tokens, with int8 or plain weights.

T tokens, K inputs, N outputs. The plain PyTorch twin of the fused int8 kernels.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers.activation import silu as apply_silu
from model.layers.dispatch import product_kernels

# "int8-dynamic": int8 weights, and inputs rounded to int8 too, with a scale for each token.
Quantization = Literal["int8", "int8-dynamic", "none"]

# On a CPU the rows of an fp32 product come out the same, bit for bit, however many rows are
# computed together, so long as their number is a multiple of this (1 to 15 rows may take other
# paths, which depend on the number of threads too).
_CPU_ROWS = 16


def linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_N1: Tensor | None = None,
    *,
    silu: bool = False,
    quantize_x: bool = False,
) -> Tensor:
    """x @ weight^T, [T, N] in the dtype of x, through silu if asked.

    An int8 weight comes with the scale of each row. With one, quantize_x rounds x to int8 too; the
    kernels do so only where it is faster, which is in prompts.
    """
    if scale_N1 is None:
        y_TN = _product(x_TK, weight_NK)
    elif kernels := product_kernels(x_TK, weight_NK.shape[1]):
        return kernels.int8_linear(x_TK, weight_NK, scale_N1, silu=silu, quantize_x=quantize_x)
    elif quantize_x:
        y_TN = _integer_product(x_TK, weight_NK, scale_N1)
    else:
        y_TN = _product(x_TK, dequantize(weight_NK, scale_N1, x_TK.dtype))
    return apply_silu(y_TN) if silu else y_TN


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [T, K] and fp32 scales [T, 1] with x ~ scale * int8: x * (127 / absmax), rounded to the
    nearest, halves to even, and absmax / 127."""
    x_TK = x_TK.float()
    most_T1 = x_TK.abs().amax(dim=1, keepdim=True)
    # A row of zeros has no levels, and 127 / 0 is not a number.
    levels_T1 = torch.where(most_T1 == 0, 0, 127 / most_T1)
    return (x_TK * levels_T1).round_().to(torch.int8), most_T1 / 127


def _integer_product(x_TK: Tensor, weight_NK: Tensor, scale_N1: Tensor) -> Tensor:
    """Sums of whole numbers, exact in fp64 as in the int32 of the kernels, then both scales."""
    data_TK, scale_T1 = quantize_rows(x_TK)
    total_TN = (data_TK.double() @ weight_NK.double().T).float()
    return (total_TN * scale_T1 * scale_N1.float().T).to(x_TK.dtype)


def _product(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    missing_rows = -len(x_TK) % _CPU_ROWS
    if x_TK.is_cuda or not missing_rows:
        return functional.linear(x_TK, weight_NK)
    return functional.linear(functional.pad(x_TK, (0, 0, 0, missing_rows)), weight_NK)[: len(x_TK)]


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * int8 weight, in the order of operations of optimum-quanto's product."""
    return scale.to(dtype) * weight


def empty_weight(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """A weight that a checkpoint is going to fill."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """A projection of the network. Quantized, it holds int8 and one bf16 scale for each row."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        bias: bool = False,
        quantization: Quantization = "none",
    ) -> None:
        super().__init__()
        quantized = quantization != "none"
        self.quantize_x = quantization == "int8-dynamic"
        weight_dtype = torch.int8 if quantized else dtype
        self.weight = empty_weight(outputs, inputs, dtype=weight_dtype, device=device)
        self.weight_scale = (
            empty_weight(outputs, 1, dtype=torch.bfloat16, device=device) if quantized else None
        )
        self.bias = empty_weight(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x_TK: Tensor, *, silu: bool = False) -> Tensor:
        """`silu` is for projections without a bias."""
        y_TN = linear(x_TK, self.weight, self.weight_scale, silu=silu, quantize_x=self.quantize_x)
        return y_TN if self.bias is None else y_TN + self.bias
