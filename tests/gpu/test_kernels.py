"""Every kernel against its slow twin in fp32; the bounds are a few roundings to bf16 (2^-9)."""

import sys

import pytest
import torch

from model.config import Residual
from model.layers import lightning_attention as slow_lightning
from model.layers import linear as slow_linear
from model.layers import moe as slow_moe
from model.layers import norm as slow_norm
from model.layers import softmax_attention as slow_softmax
from model.layers.dispatch import plain_layers
from model.layers.memory import RECENT_TOKENS
from model.layers.ragged import BLOCK_TOKENS, RaggedBatch
from model.layers.rotary import rotary as slow_rotary
from model.layers.rotary import rotary_tables
from model.layers.states import States

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from triton.runtime.jit import JITFunction  # pyright: ignore[reportMissingImports]

from model.layers.kernels import (
    experts,
    int8_linear,
    lightning_attention,
    norm,
    paged_attention,
    rotary,
    route,
)
from model.layers.kernels.experts import group_rows

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False


def random(*shape, scale=1.0, dtype=torch.bfloat16):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def random_int8(*shape):
    """Every value of int8, -128 too, and a bf16 scale for each row."""
    weight = torch.randint(-128, 128, shape, device=DEVICE, dtype=torch.int8)
    scale = torch.rand(*shape[:-1], 1, device=DEVICE) * 0.02 / shape[-1] ** 0.5 + 1e-4
    return weight, scale.to(torch.bfloat16)


def error(fast, slow):
    """|fast - slow| / |slow|, NaN and inf never pass."""
    assert torch.isfinite(fast).all()
    return float((fast.double() - slow.double()).norm() / slow.double().norm())


def batch_of(lengths, contexts, slots, blocks):
    """Block tables drawn from a shuffled pool, so that no sequence's blocks are in order."""
    pool = torch.randperm(blocks).tolist()
    tables = []
    for length, context in zip(lengths, contexts, strict=True):
        needed = -(-(length + context) // BLOCK_TOKENS)
        tables.append(pool[:needed])
        pool = pool[needed:]
    return RaggedBatch.build(lengths, contexts, slots, tables, DEVICE)


MIXED = ([1, 300, 1, 64, 1, 129, 2], [7, 0, 0, 128, 700, 640, 64])
BATCHES = pytest.mark.parametrize(
    ("lengths", "contexts"),
    [
        MIXED,
        ([1] * 9, [0, 1, 62, 63, 64, 65, 500, 2000, 3]),
        ([1], [4000]),
        ([70], [0]),
        ([1000, 63], [0, 64]),
    ],
    ids=["mixed", "decode", "one", "one_chunk", "chunks"],
)


@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 128, 200, 1000, 2000])
@pytest.mark.parametrize(("outputs", "width"), [(9216, 6144), (1000, 96), (1024, 8192)])
def test_int8_product_is_that_of_the_upcast_weights(tokens, outputs, width):
    x = random(tokens, width)
    weight, scale = random_int8(outputs, width)
    slow = slow_linear.linear(x.float(), weight, scale)
    assert error(int8_linear(x, weight, scale), slow) < 3e-3
    silu = torch.nn.functional.silu(slow)
    assert error(int8_linear(x, weight, scale, silu=True), silu) < 3e-3


@pytest.mark.parametrize("tokens", [257, 1000, 5000])
@pytest.mark.parametrize(("outputs", "width"), [(9216, 6144), (9000, 128), (10240, 6144)])
def test_product_of_int8_inputs_is_that_of_the_whole_numbers(tokens, outputs, width):
    x = random(tokens, width)
    x[3] = 0
    weight, scale = random_int8(outputs, width)
    slow = slow_linear.linear(x.float(), weight, scale, quantize_x=True)
    assert error(int8_linear(x, weight, scale, quantize_x=True), slow) < 3e-3
    silu = torch.nn.functional.silu(slow)
    assert error(int8_linear(x, weight, scale, silu=True, quantize_x=True), silu) < 3e-3


@pytest.mark.parametrize("skew", ["even", "one expert"])
@pytest.mark.parametrize("tokens", [1000, 2000])
def test_experts_of_int8_inputs_agree_with_the_loop_over_experts(tokens, skew):
    count, width, hidden = 8, 384, 256
    x = random(tokens, hidden)
    logits = torch.randn(tokens, count, device=DEVICE)
    if skew == "one expert":
        logits[:, 3] += 100
    chosen, weights = slow_moe.route(logits, 2)
    stored = (*random_int8(count, 2 * width, hidden), *random_int8(count, hidden, width))
    slow = slow_moe.experts(x.float(), chosen, weights, *stored, quantize_x=True)
    fast = experts(x, chosen, weights, *stored, quantize_x=True)
    # A value in the middle of two levels may fall either way: rounded to bf16 first, or not.
    assert error(fast, slow) < 1e-2
    assert error(fast, slow_moe.experts(x.float(), chosen, weights, *stored)) < 3e-2


@pytest.mark.parametrize(("count", "choices"), [(32, 2), (6, 3), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 8, 9, 3000])
def test_the_largest_logits_are_chosen_and_share_what_is_theirs(tokens, count, choices):
    logits = random(tokens, count)  # in bf16 some are equal
    chosen, weights = route(logits, choices)
    order = logits.float().sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(chosen, order[:, :choices])
    with plain_layers():
        _, slow = slow_moe.route(logits, choices)
    torch.testing.assert_close(weights, slow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("half", [32, 24])
@pytest.mark.parametrize("tokens", [1, 7, 3000])
def test_heads_turn_in_place_and_what_lies_beside_them_stays(tokens, half):
    qkv = random(tokens, 12, 128)  # the last two heads are values
    before = qkv.clone()
    cos, sin = rotary_tables(torch.arange(tokens, device=DEVICE) * 3 + 7, 2 * half, 1e7)
    turned = rotary(qkv[:, :10], cos, sin)
    slow = slow_rotary(before[:, :10].float(), cos, sin)
    assert turned.data_ptr() == qkv.data_ptr()
    assert error(turned[..., : 2 * half], slow[..., : 2 * half]) < 2**-8
    assert torch.equal(turned[..., 2 * half :], before[:, :10, 2 * half :])
    assert torch.equal(qkv[:, 10:], before[:, 10:])


@pytest.mark.parametrize("tokens", [3, 2000])
def test_experts_are_added_to_their_input(tokens):
    x = random(tokens, 256)
    chosen, weights = route(random(tokens, 8), 2)
    stored = (*random_int8(8, 768, 256), *random_int8(8, 256, 384))
    residual = Residual(3.5, 0.7)
    expected = 3.5 * x.double() + 0.7 * experts(x, chosen, weights, *stored).double()
    assert error(experts(x, chosen, weights, *stored, residual=residual), expected) < 3e-3


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 5000])
def test_tiles_cover_every_row_once(rows):
    grouped = group_rows(torch.randint(0, 7, (rows, 1), device=DEVICE) // 2 * 2, 8)
    places, number = grouped.tiles(128)
    starts = [0, *grouped.ends_E.tolist()]
    expected = [
        [expert, first, starts[expert + 1]]
        for expert in range(8)
        for first in range(starts[expert], starts[expert + 1], 128)
    ]
    assert places[: int(number)].tolist() == expected


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 5000])
def test_rows_keep_their_order_within_an_expert(rows):
    chosen = torch.randint(0, 7, (rows, 1), device=DEVICE)
    grouped = group_rows(chosen, 8)
    assert grouped.rows_R.tolist() == chosen.flatten().argsort(stable=True).tolist()
    assert grouped.ends_E.tolist() == chosen.flatten().bincount(minlength=8).cumsum(0).tolist()


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("skew", ["even", "one expert"])
@pytest.mark.parametrize("tokens", [1, 5, 60, 128, 150, 300, 500, 1100, 2000])  # short tiles too
def test_experts_agree_with_the_loop_over_experts(tokens, skew, quantized):
    count, width, hidden = 8, 384, 256
    x = random(tokens, hidden)
    logits = torch.randn(tokens, count, device=DEVICE)
    if skew == "one expert":
        logits[:, 3] += 100
    chosen, weights = slow_moe.route(logits, 2)
    w13, s13 = random_int8(count, 2 * width, hidden)
    w2, s2 = random_int8(count, hidden, width)
    if not quantized:
        w13, w2 = (w13 * s13.float()).bfloat16(), (w2 * s2.float()).bfloat16()
        s13 = s2 = None
    fast = experts(x, chosen, weights, w13, s13, w2, s2)
    if not quantized:
        w13, w2 = w13.float(), w2.float()
    slow = slow_moe.experts(x.float(), chosen, weights, w13, s13, w2, s2)
    assert error(fast, slow) < 6e-3


@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("tokens", [16, 64, 128, 129, 300, 3000])
def test_a_product_is_the_same_every_time(tokens, quantize_x):
    """Registers or slots used again too early show as bits that move."""
    x = random(tokens, 6144)
    weight, scale = random_int8(9216, 6144)
    how = {"quantize_x": quantize_x}
    first = int8_linear(x, weight, scale, **how)
    assert all(torch.equal(int8_linear(x, weight, scale, **how), first) for _ in range(20))


@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("tokens", [20, 60, 150, 300, 1100, 2000])
def test_experts_are_the_same_every_time(tokens, quantize_x):
    x = random(tokens, 1024)
    chosen, weights = slow_moe.route(torch.randn(tokens, 8, device=DEVICE), 2)
    w13, w2 = random_int8(8, 1024, 1024), random_int8(8, 1024, 512)
    how = {"quantize_x": quantize_x}
    first = experts(x, chosen, weights, *w13, *w2, **how)
    assert all(torch.equal(experts(x, chosen, weights, *w13, *w2, **how), first) for _ in range(20))


@pytest.mark.parametrize("heads", [64, 4])
@BATCHES
def test_lightning_attention_agrees_with_the_piecewise_form(lengths, contexts, heads):
    dim, slots = 128, len(lengths) + 3
    batch = batch_of(lengths, contexts, torch.randperm(slots)[: len(lengths)].tolist(), 200)
    # Parts of one projection, as the layer hands them over.
    qkv = random(sum(lengths), heads, 3 * dim, scale=0.3)
    q, k, v = qkv.split(dim, dim=-1)
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, device=DEVICE) / heads)
    states = packed(random(slots, heads, dim, dim, dtype=torch.float32))
    recent = random(slots, heads, 2, RECENT_TOKENS, dim)
    untouched = [pool.clone() for pool in states.tensors]
    slow_state = with_recent(states, recent, slopes, batch, contexts)
    slow = slow_lightning.lightning_attention(
        q.float(), k.float(), v.float(), slopes, States(slow_state), batch
    )
    fast = lightning_attention(q, k, v, slopes, states, batch, recent)
    ends = [context + length for context, length in zip(contexts, lengths, strict=True)]
    assert error(fast, slow) < 5e-3
    assert error(with_recent(states, recent, slopes, batch, ends), slow_state) < 3e-3
    others = sorted(set(range(slots)) - set(batch.slots_S.tolist()))
    for pool, before in zip(states.tensors, untouched, strict=True):
        assert torch.equal(pool[others], before[others])


def packed(state) -> States:
    slots, heads, size, _ = state.shape
    states = States.empty(slots, heads, size, DEVICE, packed=True)
    states.write(list(range(len(state))), state)
    return states


def with_recent(states, recent, slopes, batch, ends) -> torch.Tensor:
    """The states once the tokens that wait beside them have joined, after `ends` tokens each.

    Before RECENT_TOKENS none has joined, and what is left in the slot counts for nothing."""
    state = states.read(list(range(len(recent))))
    for slot, end in zip(batch.slots_S.tolist(), ends, strict=True):
        if end < RECENT_TOKENS:
            state[slot] = 0
        for i in range(end % RECENT_TOKENS):
            k, v = recent[slot, :, :, i].float().unbind(1)
            fall = torch.exp(-slopes)[:, None, None]
            state[slot] = state[slot] * fall + k[:, :, None] * v[:, None, :]
    return state


def test_what_a_slot_held_before_reaches_no_token():
    """Also after prompts too short to join the state, which nothing has written then."""
    slopes = torch.tensor([0.5, 0.1, 0.01, 0.001], device=DEVICE)
    lengths, contexts = [1, 3, 7, 8, 9], [0] * 5
    states = States.empty(5, 4, 128, DEVICE, packed=True)
    states.data_SHKV.fill_(9)
    states.tensors[1].fill_(float("nan"))
    recent = torch.full((5, 4, 2, RECENT_TOKENS, 128), float("nan"), device=DEVICE).bfloat16()
    slow_states = States.empty(5, 4, 128, DEVICE, packed=False)
    for _ in range(3 * RECENT_TOKENS):
        batch = batch_of(lengths, contexts, list(range(5)), 8)
        q, k, v = (random(sum(lengths), 4, 128) for _ in range(3))
        fast = lightning_attention(q, k, v, slopes, states, batch, recent)
        slow = slow_lightning.lightning_attention(
            q.float(), k.float(), v.float(), slopes, slow_states, batch
        )
        assert error(fast, slow) < 5e-3
        contexts = [context + length for context, length in zip(contexts, lengths, strict=True)]
        lengths = [1] * 5


def test_a_decode_state_loses_nothing_to_bf16():
    slopes = torch.full((64,), 0.01, device=DEVICE)
    state = random(4, 64, 128, 128, dtype=torch.float32)
    states, slow_states = packed(state), States(state)
    recent = random(4, 64, 2, RECENT_TOKENS, 128)
    for context in range(64, 64 + 6 * RECENT_TOKENS):
        batch = batch_of([1] * 4, [context] * 4, [0, 1, 2, 3], 8)
        q, k, v = (random(4, 64, 128) for _ in range(3))
        fast = lightning_attention(q, k, v, slopes, states, batch, recent)
        slow = slow_lightning.lightning_attention(
            q.float(), k.float(), v.float(), slopes, slow_states, batch
        )
        assert error(fast, slow) < 5e-3
    assert error(states.read(list(range(4))), state) < 1e-4


def compiled() -> int:
    """Kernels that Triton has compiled or loaded for the functions of model.layers.kernels."""
    functions = {
        id(function): function
        for name, module in sys.modules.items()
        if name.startswith("model.layers.kernels.")
        for function in vars(module).values()
        if isinstance(function, JITFunction)
    }
    return sum(len(kernels) for f in functions.values() for kernels, *_ in f.device_caches.values())


def every_layer(lengths, contexts):
    """All kernels of layers, for a batch."""
    tokens, slots = sum(lengths), list(range(len(lengths)))
    batch = batch_of(lengths, contexts, slots, 400)
    x = random(tokens, 1024)
    for silu in (False, True):
        int8_linear(x, *random_int8(9216, 1024), silu=silu)
    chosen, weights = route(random(tokens, 8), 2)
    w13, w2 = random_int8(8, 1024, 1024), random_int8(8, 1024, 512)
    experts(x, chosen, weights, *w13, *w2)
    q, k, v = random(tokens, 8, 3 * 128).split(128, dim=-1)
    cos, sin = rotary_tables(batch.positions_T, 64, 1e7)
    rotary(k, cos, sin)
    keys, values = torch.zeros(2, 400, BLOCK_TOKENS, 8, 128, device=DEVICE).bfloat16()
    paged_attention(q, k, v, keys, values, batch)
    recent = random(len(slots), 8, 2, RECENT_TOKENS, 128)
    states = States.empty(len(slots), 8, 128, DEVICE, packed=True)
    lightning_attention(q, k, v, torch.rand(8, device=DEVICE), states, batch, recent)


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (([1] * 50, 100), [([1] * 51, 3), ([1] * 57, 90), ([1] * 64, 101)]),
        (([2000], 0), [([1003, 1, 999], 0), ([600, 512, 777, 331], 128)]),
    ],
    ids=["decode", "prompts"],
)
def test_a_batch_of_another_size_waits_for_no_compiler(first, others):
    """A kernel takes a second to compile, and meanwhile the GPU has nothing to do."""
    every_layer(first[0], [first[1]] * len(first[0]))
    every_layer([2000, 1], [0, 100])  # both parts of a mixed one
    known = compiled()
    assert known > 10
    for lengths, context in others:
        every_layer(lengths, [context] * len(lengths))
    assert compiled() == known


@pytest.mark.parametrize(("heads", "groups"), [(64, 8), (4, 4)])
@BATCHES
def test_paged_attention_agrees_with_the_piecewise_form(lengths, contexts, heads, groups):
    dim, blocks = 128, 200
    batch = batch_of(lengths, contexts, list(range(len(lengths))), blocks)
    tokens = sum(lengths)
    q = random(tokens, heads, dim)
    k, v = random(tokens, groups, 2 * dim).split(dim, dim=-1)
    keys, values = (random(blocks, BLOCK_TOKENS, groups, dim) for _ in range(2))
    for sequence, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        end = context + length
        block = int(batch.blocks_SB[sequence, (end - 1) // BLOCK_TOKENS])
        for pool in (keys, values):  # what was left there must not reach the result
            pool[block, (end - 1) % BLOCK_TOKENS + 1 :] = float("nan")
    slow_keys, slow_values = keys.float(), values.float()
    slow = slow_softmax.paged_attention(
        q.float(), k.float(), v.float(), slow_keys, slow_values, batch
    )
    fast = paged_attention(q, k, v, keys, values, batch)
    assert error(fast, slow) < 6e-3
    assert torch.equal(keys.nan_to_num(9.0), slow_keys.nan_to_num(9.0).bfloat16())
    assert torch.equal(values.nan_to_num(9.0), slow_values.nan_to_num(9.0).bfloat16())


@pytest.mark.parametrize("width", [6144, 8192, 96])
@pytest.mark.parametrize("tokens", [1, 77])
def test_fused_norms_agree_with_the_plain_ones(tokens, width):
    x, y, weight = random(tokens, width), random(tokens, width), random(width)
    f = torch.Tensor.float
    plain = slow_norm.rms_norm(f(x), f(weight), 1e-5)
    assert error(norm.rms_norm(x, weight, 1e-5), plain) < 3e-3
    residual = slow_norm.rms_norm(3.5 * f(x) + 0.5 * f(y), f(weight), 1e-5)
    assert error(norm.residual_norm(x, y, 3.5, 0.5, weight, 1e-5), residual) < 3e-3
    gated = slow_norm.rms_norm(f(x), f(weight), 1e-6) * torch.sigmoid(f(y))
    assert error(norm.gated_norm(x, y, weight, 1e-6), gated) < 3e-3


def test_decode_kernels_can_be_captured_once_and_replayed_with_longer_contexts():
    """No host synchronisation, and no grid that depends on the contexts."""
    lengths, contexts = [1] * 5, [100, 3, 63, 900, 0]
    heads, groups, dim, blocks = 64, 8, 128, 64
    batch = batch_of(lengths, contexts, [4, 3, 2, 1, 0], blocks)
    q, k, v = random(5, heads, dim), random(5, groups, dim), random(5, groups, dim)
    keys, values = (random(blocks, BLOCK_TOKENS, groups, dim) for _ in range(2))
    paged_attention(q, k, v, keys, values, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fast = paged_attention(q, k, v, keys, values, batch)
    batch.contexts_S.sub_(1).clamp_(min=0)
    shorter = batch_contexts(batch, [max(c - 1, 0) for c in contexts])
    slow = slow_softmax.paged_attention(
        q.float(), k.float(), v.float(), keys.float(), values.float(), shorter
    )
    graph.replay()
    assert error(fast, slow) < 6e-3


def batch_contexts(batch, contexts):
    """The same sequences and tables with other contexts."""
    return RaggedBatch.build(
        batch.lengths, contexts, batch.slots_S.tolist(), batch.blocks_SB.tolist(), DEVICE
    )
