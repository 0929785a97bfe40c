"""Rules tokens out where their logits are.

N rows, V vocabulary; C masks of W = ceil(V / 32) words.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def mask_logits(logits_NV: Tensor, rows_C: Tensor, bits_CW: Tensor) -> None:
    """-inf in place, in each of these rows, for tokens v whose bit v % 32 of word v // 32 is 0.

    logits_NV: fp32, contiguous. rows_C, bits_CW: int32, contiguous.
    """
    masks, words = bits_CW.shape
    vocabulary = logits_NV.shape[1]
    _mask[(masks, triton.cdiv(vocabulary, _BLOCK))](
        logits_NV, rows_C, bits_CW, vocabulary, words, BLOCK=_BLOCK
    )


@triton.jit
def _mask(logits, rows, bits, V, W, BLOCK: tl.constexpr):
    mask = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = v < V
    word = tl.load(bits + mask * W + v // 32, mask=live, other=-1)
    ruled_out = ((word >> (v % 32)) & 1) == 0
    row = tl.load(rows + mask).to(tl.int64)
    tl.store(logits + row * V + v, float("-inf"), mask=live & ruled_out)
