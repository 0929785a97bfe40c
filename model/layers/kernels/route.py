"""The experts of every token and their weights, in one launch. T tokens, E experts, K choices."""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 8  # of a program


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest logits of each token, largest first, of equal ones the lower index: int64
    [T, K], and the softmax over them alone, fp32 [T, K]."""
    logits_TE = logits_TE.contiguous()
    tokens, count = logits_TE.shape
    experts_TK = torch.empty(tokens, top_k, device=logits_TE.device, dtype=torch.int64)
    weights_TK = torch.empty(tokens, top_k, device=logits_TE.device, dtype=torch.float32)
    if tokens:
        _route[(triton.cdiv(tokens, TOKENS),)](
            logits_TE, experts_TK, weights_TK, tokens, count,
            CHOICES=top_k, PADDED=triton.next_power_of_2(top_k), TOKENS=TOKENS,
            EXPERTS=triton.next_power_of_2(count), num_warps=1,
        )  # fmt: skip
    return experts_TK, weights_TK


@triton.jit(do_not_specialize=["T"])
def _route(
    logits, experts, weights, T, E, CHOICES: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    each = tl.arange(0, EXPERTS)
    choice = tl.arange(0, PADDED)
    live = (t < T)[:, None] & (each < E)[None, :]
    left = tl.load(logits + t[:, None] * E + each[None, :], mask=live, other=float("-inf"))
    left = left.to(tl.float32)
    most = tl.max(left, 1)
    chosen = tl.zeros((TOKENS, PADDED), tl.int64)
    share = tl.zeros((TOKENS, PADDED), tl.float32)
    for i in tl.static_range(CHOICES):
        best = tl.max(left, 1)
        index = tl.min(tl.where(left == best[:, None], each[None, :], E - 1), 1)
        chosen = tl.where((choice == i)[None, :], index[:, None].to(tl.int64), chosen)
        share = tl.where((choice == i)[None, :], tl.exp(best - most)[:, None], share)
        left = tl.where(each[None, :] == index[:, None], float("-inf"), left)
    share /= tl.sum(share, 1)[:, None]
    places = t[:, None] * CHOICES + choice[None, :]
    live = (t < T)[:, None] & (choice < CHOICES)[None, :]
    tl.store(experts + places, chosen, mask=live)
    tl.store(weights + places, share, mask=live)
