"""Lightning attention over a ragged batch; packed states are read from and left in their slots.

T tokens, H heads, D head width, S sequences; states are [slots, H, D(keys), D(values)], int16, and
their scales [slots, H, groups of values, D(keys)]. Two kernels share a batch by the length of the
sequence: chunks of prompts in the block form, single tokens in the recurrent one. A state holds the
tokens up to the last multiple of R = RECENT_TOKENS; keys and values of those after it are in
[slots, H, 2, R, D], and join it together.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from model.layers.memory import RECENT_TOKENS
from model.layers.states import LEVELS, SHARED_SCALE, States

CHUNK = 64  # tokens a step of the block form
_LEVELS = tl.constexpr(float(LEVELS))


def lightning_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, slopes_H: Tensor, states: States, batch,
    recent_SHxRD: Tensor,
) -> Tensor:  # fmt: skip
    """S = exp(-slope) S + k^T v, o = q S -> o_THD bf16; the pools are updated in place.

    q, k, v may be views with a contiguous last dimension (parts of one projection); slopes fp32.
    states must be packed. One that no token has joined, of a context below RECENT_TOKENS, is zero
    whatever its slot holds. Raises ValueError for several tokens after a context that is no
    multiple of it.
    """
    for length, context in zip(batch.lengths, batch.contexts, strict=True):
        if length > 1 and context % RECENT_TOKENS:
            raise ValueError(f"{length} tokens after {context}, no multiple of {RECENT_TOKENS}")
    tokens, heads, width = q_THD.shape
    o_THD = torch.empty(tokens, heads, width, device=q_THD.device, dtype=q_THD.dtype)
    sequences = len(batch.lengths)
    tensors = (q_THD, k_THD, v_THD, o_THD, slopes_H, *states.tensors, recent_SHxRD)
    where = (batch.offsets_S1, batch.contexts_S, batch.slots_S)
    strides = (*q_THD.stride()[:2], *k_THD.stride()[:2], *v_THD.stride()[:2])
    if any(length > 1 for length in batch.lengths):
        columns = min(width, SHARED_SCALE)
        _lightning_chunks[(width // columns, heads, sequences)](
            *tensors, *where, *strides, heads,
            WIDTH=width, COLUMNS=columns, CHUNK=CHUNK, RECENT=RECENT_TOKENS,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    if any(length == 1 for length in batch.lengths):
        columns = min(width, SHARED_SCALE)
        _lightning_single_tokens[(width // columns, heads, sequences)](
            *tensors, *where, *strides, heads,
            WIDTH=width, COLUMNS=columns, RECENT=RECENT_TOKENS, num_warps=4,
        )  # fmt: skip
    return o_THD


@triton.jit
def _lightning_chunks(
    q, k, v, o, slopes, state, scale, recent, offsets, contexts, slots,
    q_token, q_head, k_token, k_head, v_token, v_head, heads,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """One sequence, one head, COLUMNS of the values: CHUNK tokens a step."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(offsets + sequence)
    length = tl.load(offsets + sequence + 1) - start
    if length < 2:
        return
    i = tl.arange(0, CHUNK)
    d = tl.arange(0, WIDTH)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rate = tl.load(slopes + head) * 1.4426950408889634  # decay a token as a power of two
    # exp(-slope * (i - j)) = fall_i * rise_j: at most e^64 and e^-64, well inside fp32 and bf16.
    fall = tl.exp2(-rate * i)
    rise = tl.exp2(rate * i)
    decay = tl.exp2(-rate)
    causal = i[:, None] >= i[None, :]

    slot = tl.load(slots + sequence).to(tl.int64)
    row = slot * heads + head
    place = state + row * WIDTH * WIDTH + d[:, None] * WIDTH + column[None, :]
    scale += (row * (WIDTH // COLUMNS) + tl.program_id(0)) * WIDTH + d
    memory = tl.zeros((WIDTH, COLUMNS), tl.float32)
    if tl.load(contexts + sequence) > 0:
        memory = tl.load(place).to(tl.float32) * tl.load(scale)[:, None]
    first = start.to(tl.int64)
    q += first * q_token + head * q_head
    k += first * k_token + head * k_head
    v += first * v_token + head * v_head
    o += (first * heads + head) * WIDTH
    # The last tokens, which do not join the state yet.
    r = tl.arange(0, RECENT)
    waits = (r < length % RECENT)[:, None]
    token = (length // RECENT * RECENT + r)[:, None]
    keys = recent + row * 2 * RECENT * WIDTH + r[:, None] * WIDTH
    values = keys + RECENT * WIDTH
    k_RD = tl.load(k + token * k_token + d[None, :], mask=waits)
    v_RV = tl.load(v + token * v_token + column[None, :], mask=waits)
    tl.store(keys + d[None, :], k_RD, mask=waits)
    tl.store(values + column[None, :], v_RV, mask=waits)
    for done in range(0, length, CHUNK):
        left = length - done
        live = (i < left)[:, None]
        q_CD = tl.load(q + i[:, None] * q_token + d[None, :], mask=live, other=0.0)
        k_CD = tl.load(k + i[:, None] * k_token + d[None, :], mask=live, other=0.0)
        v_CV = tl.load(v + i[:, None] * v_token + column[None, :], mask=live, other=0.0)
        # Both products of k take it risen, so the chunk's decays need no matrix of their own.
        k_CD = (k_CD.to(tl.float32) * rise[:, None]).to(k_CD.dtype)
        memory *= decay
        scores = tl.where(causal, tl.dot(q_CD, tl.trans(k_CD)), 0.0)
        out = tl.dot(q_CD, memory.to(q_CD.dtype))
        out = tl.dot(scores.to(v_CV.dtype), v_CV, out) * fall[:, None]
        tl.store(
            o + i[:, None] * heads * WIDTH + column[None, :], out.to(o.dtype.element_ty), mask=live
        )
        # The last chunk may be short: decay by the tokens that are there and join.
        joining = tl.minimum(left // RECENT * RECENT, CHUNK)
        k_CD = tl.where((i < joining)[:, None], k_CD, 0.0)
        memory = tl.dot(tl.trans(k_CD), v_CV, memory)
        memory *= tl.exp2(-rate * (joining - 1))
        q += CHUNK * q_token
        k += CHUNK * k_token
        v += CHUNK * v_token
        o += CHUNK * heads * WIDTH
    _store_packed(place, scale, memory)


@triton.jit
def _lightning_single_tokens(
    q, k, v, o, slopes, state, scale, recent, offsets, contexts, slots,
    q_token, q_head, k_token, k_head, v_token, v_head, heads,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """One sequence of one new token, one head, COLUMNS of the values."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    token = tl.load(offsets + sequence).to(tl.int64)
    if tl.load(offsets + sequence + 1) - token != 1:
        return
    d = tl.arange(0, WIDTH)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(slots + sequence).to(tl.int64) * heads + head
    place = state + row * WIDTH * WIDTH + d[:, None] * WIDTH + column[None, :]
    keys = recent + row * 2 * RECENT * WIDTH
    values = keys + RECENT * WIDTH
    context = tl.load(contexts + sequence)
    waiting = context % RECENT
    scale += (row * (WIDTH // COLUMNS) + tl.program_id(0)) * WIDTH + d
    memory = tl.load(place, mask=context >= RECENT, other=0).to(tl.float32)
    scale_D = tl.load(scale, mask=context >= RECENT, other=0.0)
    q_D = tl.load(q + token * q_token + head * q_head + d).to(tl.float32)
    k_D = tl.load(k + token * k_token + head * k_head + d)
    v_V = tl.load(v + token * v_token + head * v_head + column)
    slope = tl.load(slopes + head)
    if waiting == RECENT - 1:
        fall = tl.exp(-slope)
        memory *= scale_D[:, None]
        for i in range(RECENT - 1):
            k_iD = tl.load(keys + i * WIDTH + d).to(tl.float32)
            v_iV = tl.load(values + i * WIDTH + column).to(tl.float32)
            memory = memory * fall + k_iD[:, None] * v_iV[None, :]
        memory = memory * fall + k_D.to(tl.float32)[:, None] * v_V.to(tl.float32)[None, :]
        _store_packed(place, scale, memory)
        out = tl.sum(q_D[:, None] * memory, 0)
    else:
        tl.store(keys + waiting * WIDTH + d, k_D)
        tl.store(values + waiting * WIDTH + column, v_V)
        r = tl.arange(0, RECENT)
        waits = (r < waiting)[:, None]
        k_RD = tl.load(keys + r[:, None] * WIDTH + d[None, :], mask=waits, other=0.0)
        v_RV = tl.load(values + r[:, None] * WIDTH + column[None, :], mask=waits, other=0.0)
        scores_R = tl.sum(q_D[None, :] * k_RD.to(tl.float32), 1) * tl.exp(-slope * (waiting - r))
        # The scales of the keys meet the query, of which there is one.
        out = tl.sum((q_D * scale_D)[:, None] * memory, 0) * tl.exp(-slope * (waiting + 1))
        out += tl.sum(scores_R[:, None] * v_RV.to(tl.float32), 0)
        out += tl.sum(q_D * k_D.to(tl.float32), 0) * v_V.to(tl.float32)
    tl.store(o + (token * heads + head) * WIDTH + column, out.to(o.dtype.element_ty))


@triton.jit
def _store_packed(place, scale, memory):
    """As States.write does, where all values of a key in hand share a scale."""
    most_D = tl.max(tl.abs(memory), 1)
    # A group of zeros has no levels.
    levels_D = tl.where(most_D == 0, 0.0, tl.div_rn(_LEVELS, most_D))
    tl.store(place, libdevice.rint(memory * levels_D[:, None]).to(tl.int16))
    tl.store(scale, tl.div_rn(most_D, _LEVELS))
