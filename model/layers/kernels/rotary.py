"""Rotary position embedding, in place and in one launch. T tokens, H heads, D head width."""

# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # heads of tokens a program


def rotary(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotates the first 2 R dimensions of each head, as pairs (i, i + R), and returns x_THD.

    x_THD may be a view, such as the heads of queries and keys in one projection; its last dimension
    is contiguous. cos_TR, sin_TR: fp32.
    """
    tokens, heads, _ = x_THD.shape
    half = cos_TR.shape[1]
    if tokens:
        _rotary[(triton.cdiv(tokens * heads, ROWS),)](
            x_THD, cos_TR, sin_TR, tokens * heads, heads, *x_THD.stride()[:2],
            HALF=half, PADDED=triton.next_power_of_2(half), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return x_THD


@triton.jit(do_not_specialize=["count"])
def _rotary(
    x, cos, sin, count, heads, x_token, x_head,
    HALF: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, PADDED)
    token = row // heads
    live = (row < count)[:, None] & (i < HALF)[None, :]
    angle = token[:, None] * HALF + i[None, :]
    cos_RI = tl.load(cos + angle, mask=live, other=0.0)
    sin_RI = tl.load(sin + angle, mask=live, other=0.0)
    place = x + (token.to(tl.int64) * x_token + (row % heads) * x_head)[:, None] + i[None, :]
    first = tl.load(place, mask=live, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=live, other=0.0).to(tl.float32)
    tl.store(place, (first * cos_RI - second * sin_RI).to(x.dtype.element_ty), mask=live)
    tl.store(place + HALF, (second * cos_RI + first * sin_RI).to(x.dtype.element_ty), mask=live)
