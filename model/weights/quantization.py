"""int8 weights by optimum-quanto's rule: symmetric, one scale for each output row.

N output rows, K inputs.
"""

import torch
from torch import Tensor

_QMAX = 127
# Quantized at a time by each thread: its fp32 copies stay in the core's cache, and below the size
# for which memory is asked of the system anew. 8 MiB at a time take two to five times as long.
_CPU_ELEMENTS = 1 << 17


def quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N, K], scale bf16 [N, 1]) with weight ~ scale * int8.

    scale = absmax / 127 in fp32, rounded to bf16; the weight is divided by the rounded scale.
    That is quanto's qint8 of an fp32 weight with its scale in bf16, the most exact of the
    variants that quanto can read (0.887% error of a product, against 0.932% all in bf16).
    """
    if weight_NK.device.type != "cpu":
        return _quantize(weight_NK)
    data = torch.empty(weight_NK.shape, dtype=torch.int8)
    scale = torch.empty(len(weight_NK), 1, dtype=torch.bfloat16)
    rows = max(1, _CPU_ELEMENTS * torch.get_num_threads() // weight_NK.shape[1])
    for start in range(0, len(data), rows):
        part = slice(start, start + rows)
        data[part], scale[part] = _quantize(weight_NK[part])
    return data, scale


def _quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight_NK.float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / _QMAX).to(torch.bfloat16)
    data = (weight / scale.float()).round_().clamp_(-_QMAX - 1, _QMAX)
    # A row of zeros has the scale 0, and 0 / 0 is not a number.
    return data.nan_to_num_(0).to(torch.int8), scale
