"""The training forward of a Decoder: whole pages and their answers at once, differentiable.

Computes what `Decoder` computes (a test compares the logits) from the same weights, but batched,
and in few large steps: at these sizes a GPU waits for memory and for launches, never for sums.
Steps between two products know no pages, only N tokens, so few sizes of them must be compiled.

B pages, T tokens, N = B * T, H heads, G kv heads, D head dimensions, W hidden size,
C tokens of a chunk, M chunks of a page, L chunks of all pages, E experts, F inner dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from model.decoder import Decoder
from model.inputs.tiling import Layout
from model.layers.lightning_attention import LightningAttention
from model.layers.rotary import rotary, rotary_tables
from model.vision.packing import pack

CHUNK = 64  # the language model runs on whole chunks: pages are padded in front, answers behind

# What a layer hands on to the answers: a lightning state [H, B, D * D], or keys and values
# [B, T, G, D] of the prompt.
Memory = Any


@dataclass(frozen=True)
class Passed:
    """What all layers gave. hidden: [B, T, W] after each. memories: after the last token, of
    pages only. queries_and_keys: [B, T, H, D] and [B, T', G, D] of each softmax layer, padding
    left out. imbalance: 1 a layer when all experts are as likely."""

    hidden: list[Tensor]
    memories: list[Memory]
    queries_and_keys: dict[int, tuple[Tensor, Tensor]]
    imbalance: Tensor


class Steps:
    """The steps that take tokens or tiles, as they are or through torch.compile.

    `compiled`: once for each number of tokens, since symbolic sizes have failed on torch 2.11;
    whoever makes batches keeps those numbers few.
    """

    def __init__(self, *, compiled: bool = False) -> None:
        self.compiled = compiled
        compile_ = partial(torch.compile, dynamic=False) if compiled else _as_it_is
        self.see, self.open = compile_(_see), compile_(_open)
        self.close, self.finish = compile_(_close), compile_(_finish)


def _as_it_is(step: Callable[..., Any]) -> Callable[..., Any]:
    return step


def see(decoder: Decoder, pixels_NSSC: Tensor, steps: Steps) -> Tensor:
    """Tiles through vision tower and projector, [N, P, W]. Pixels are normalised."""
    tower: Any = decoder.vision_tower
    x = tower.embed(pixels_NSSC)
    for layer in tower.layers:
        x = steps.see(x, layer.heads, layer.layer_norm1.eps, *_vision_weights(layer))
    return decoder.projector(x[:, 1:].flatten(0, 1)).view(len(x), x.shape[1] - 1, -1)


def _vision_weights(layer: Any) -> list[Tensor]:
    parts = (layer.layer_norm1, layer.qkv_proj, layer.out_proj, layer.layer_norm2)
    return [w for part in (*parts, layer.fc1, layer.fc2) for w in (part.weight, part.bias)]


def _see(x: Tensor, heads: int, eps: float, *weights: Tensor) -> Tensor:
    """A layer of the tower. Biases are added within the products."""
    norm1, bias1, qkv, qkv_bias, out, out_bias, norm2, bias2, fc1, fc1_bias, fc2, fc2_bias = weights
    y = functional.layer_norm(x, norm1.shape, norm1, bias1, eps)
    y = functional.linear(y, qkv, qkv_bias).unflatten(-1, (3, heads, -1))
    q, k, v = y.permute(2, 0, 3, 1, 4)
    y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + functional.linear(y, out, out_bias)
    y = functional.layer_norm(x, norm2.shape, norm2, bias2, eps)
    return x + functional.linear(
        functional.gelu(functional.linear(y, fc1, fc1_bias)), fc2, fc2_bias
    )


@cache
def _packed_order(layout: Layout, device: torch.device) -> Tensor:
    """Which feature of a page each image token is; the newline comes after all features."""
    patches = (layout.tile // layout.patch) ** 2
    features = torch.arange(layout.tiles * patches).view(layout.tiles, patches, 1)
    newline = torch.tensor([features.numel()])
    return pack(features, newline, layout).flatten().to(device)


@cache
def grid_order(layout: Layout, device: torch.device) -> Tensor:
    """Which feature each patch of the grid is, when the thumbnail is left out: [P]."""
    thumbnail = (layout.tile // layout.patch) ** 2
    order = _packed_order(layout, device)[thumbnail:] - thumbnail
    return order.view(layout.patch_rows, -1)[:, :-1].flatten()


def embed_pages(
    decoder: Decoder, features_NPW: Tensor, layout: Layout, prefix_ids: Tensor, tokens: int
) -> Tensor:
    """What `see` gave of the tiles, as everything before the question: [B, tokens, W].

    The embeddings stand at the end, zeros before them: no projection of the language model has a
    bias, so what is zero stays zero in every layer, and leaves the lightning states at zero.
    """
    newline = decoder.image_newline
    features = features_NPW.view(-1, layout.tiles * features_NPW.shape[1], features_NPW.shape[2])
    pages = len(features)
    with_newline = torch.cat([features, newline.expand(pages, 1, -1)], dim=1)
    image = with_newline.index_select(1, _packed_order(layout, newline.device))
    prefix = decoder.embed_tokens(prefix_ids).expand(pages, -1, -1)
    padding = tokens - prefix.shape[1] - image.shape[1]
    if padding < 0:
        raise ValueError(f"{tokens} tokens for a page of {prefix.shape[1] + image.shape[1]}")
    return torch.cat([newline.new_zeros(pages, padding, newline.shape[0]), prefix, image], dim=1)


def run_layers(
    decoder: Decoder,
    hidden: Tensor,
    steps: Steps,
    *,
    memories: Sequence[Memory] | None = None,
    start: int = 0,
    padding: int = 0,
) -> Passed:
    """Without memories, tokens begin a text, after `padding` tokens of zeros; with them, they go on
    at position `start` from what the layers gave for their page. With twice as many rows as pages,
    the rows go through the pages twice.
    Raises ValueError when they are no whole chunks."""
    if hidden.shape[1] % CHUNK:
        raise ValueError(f"{hidden.shape[1]} tokens; expected a multiple of {CHUNK}")
    passed = Passed([], [], {}, hidden.new_zeros((), dtype=torch.float32))
    valid = torch.ones(hidden.shape[:2], device=hidden.device)
    valid[:, :padding] = 0
    valid = valid.flatten()
    imbalance = passed.imbalance
    positions = start - padding + torch.arange(hidden.shape[1], device=hidden.device)
    for i, layer in enumerate(decoder.layers.values()):
        parts: Any = layer
        memory = memories[i] if memories else None
        if isinstance(parts.attention, LightningAttention):
            x, attended, memory = _lightning(parts, hidden, memory, steps)
        else:
            x = _normed(hidden, parts.input_layernorm)
            attended, memory, pointers = _softmax(parts.attention, x, memory, positions, padding)
            passed.queries_and_keys[i] = pointers
        flat, uneven = _finish_layer(parts, x, attended, valid, steps)
        imbalance = imbalance + uneven
        hidden = flat.view(hidden.shape)
        passed.hidden.append(hidden)
        passed.memories.append(memory)
    return Passed(passed.hidden, passed.memories, passed.queries_and_keys, imbalance)


def _normed(x: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _lightning(
    layer: Any, x: Tensor, memory: Memory, steps: Steps
) -> tuple[Tensor, Tensor, Memory]:
    """The normed input [N, W], what attention adds to it [N, W], and the state after the tokens."""
    attention, norm = layer.attention, layer.input_layernorm
    normed, q, gate, inside, update = steps.open(
        x.flatten(0, 1), attention.slopes_H, norm.weight, norm.eps,
        attention.qkv_proj.weight, attention.output_gate.weight,
    )  # fmt: skip
    states, last = carry(update, attention.slopes_H, len(x), memory)
    attended = steps.close(
        q, states, inside, gate, attention.norm.weight, attention.norm.eps,
        attention.out_proj.weight,
    )  # fmt: skip
    return normed, attended, last


def _open(
    x: Tensor, slopes_H: Tensor, norm: Tensor, eps: float, qkv_proj: Tensor, output_gate: Tensor
) -> tuple[Tensor, ...]:
    """What lightning attention computes inside each chunk."""
    x = functional.rms_norm(x, norm.shape, norm, eps)
    wide = functional.linear(x, torch.cat([qkv_proj, output_gate]))
    qkv, gate = wide.split([len(qkv_proj), len(output_gate)], dim=-1)
    q, inside, update = chunks(functional.silu(qkv), slopes_H)
    return x, q, gate, inside, update


def chunks(qkv: Tensor, slopes_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [N, H * 3 * D] to q, faded since the chunk began, [H, L, C, D]; what the chunk's own
    tokens give, likewise; and what the chunk adds to the state, [H, L, D, D].

    exp(-s (i - j)) is exp(-s (i + 1)) of q times exp(s (j + 1)) of k: 2^23 at the most for 4 heads,
    and what floating point loses by it is nothing. The state's share is faded in `carry`.
    """
    parts = qkv.view(-1, CHUNK, len(slopes_H), 3, qkv.shape[-1] // (3 * len(slopes_H)))
    q, k, v = parts.permute(3, 2, 0, 1, 4)  # HLCD
    faded = torch.exp(-slopes_H[:, None] * torch.arange(1, CHUNK + 1, device=qkv.device))
    faded = faded[:, None, :, None]
    q, k = (q * faded).to(qkv.dtype), (k / faded).to(qkv.dtype)
    inside = torch.tril(q @ k.transpose(-1, -2)) @ v
    return q, inside, k.transpose(-1, -2) @ v


def carry(
    update: Tensor, slopes_H: Tensor, pages: int, first: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The state before every chunk, [H, L, D, D], and after the last one of pages, [H, B, D * D]
    (None when there is a first state: what follows a page is followed by nothing).

    All of them are one product of the updates with a matrix of what is left of each.
    """
    shape = update.shape
    update = update.view(shape[0], pages, -1, shape[2] * shape[3])  # HBMX
    ends = torch.arange(update.shape[2] + 1, device=update.device)
    distance = ends[:, None] - ends
    left = torch.exp(-slopes_H[:, None, None] * CHUNK * distance.clamp(min=0)) * (distance > 0)
    left = left.to(update.dtype)[:, None]  # [H, 1, M + 1, M + 1]
    if first is None:
        last = (left[:, :, -1:, :-1] @ update).squeeze(2)
        return (left[:, :, :-1, :-1] @ update).view(shape), last
    since = torch.exp(-slopes_H[:, None] * CHUNK * ends[:-1]).to(update.dtype)[:, None, :, None]
    first = first.repeat(1, pages // first.shape[1], 1)[:, :, None]
    return (left[:, :, :-1, :-1] @ update + since * first).view(shape), None


def _close(
    q: Tensor,
    states: Tensor,
    inside: Tensor,
    gate: Tensor,
    norm: Tensor,
    eps: float,
    out_proj: Tensor,
) -> Tensor:
    """What lightning attention adds, [N, W]."""
    o = (inside + q @ states).permute(1, 2, 0, 3).reshape(gate.shape)
    o = torch.sigmoid(gate) * functional.rms_norm(o, norm.shape, norm, eps)
    return functional.linear(o, out_proj)


def _softmax(
    attention: Any, x: Tensor, memory: Memory, positions: Tensor, padding: int
) -> tuple[Tensor, Memory, tuple[Tensor, Tensor]]:
    qkv = functional.linear(x, attention.qkv_proj.weight)
    qkv = qkv.unflatten(-1, (-1, attention.head_dim))
    heads, groups = attention.heads
    cos, sin = rotary_tables(positions, attention.rotary_dim, attention.rope_theta)
    turned = rotary(qkv[:, :, : heads + groups], cos, sin)[:, padding:]
    (q, k), v = turned.split([heads, groups], dim=2), qkv[:, padding:, heads + groups :]
    own = (k, v)
    if memory is not None:
        times = len(x) // len(memory[0])
        k, v = (torch.cat([m.repeat(times, 1, 1, 1), new], dim=1)
                for m, new in zip(memory, own, strict=True))  # fmt: skip
    o = functional.pad(_attend(q, k, v).flatten(2), (0, 0, padding, 0))
    return functional.linear(o, attention.out_proj.weight).flatten(0, 1), own, (q, k)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal; the last query stands at the last key. [B, T, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = functional.scaled_dot_product_attention
    if q.shape[2] == k.shape[2]:
        return attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    mask: Any = causal_lower_right(q.shape[2], k.shape[2])
    return attend(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def _finish_layer(
    layer: Any, x: Tensor, attended: Tensor, valid: Tensor, steps: Steps
) -> tuple[Tensor, Tensor]:
    norm, moe = layer.post_attention_layernorm, layer.moe
    first, second = layer.attention_residual, layer.moe.residual
    return steps.finish(
        x.flatten(0, -2), attended, valid, first.alpha, first.beta, second.alpha, second.beta,
        norm.weight, norm.eps, moe.gate.weight, moe.w13, moe.w2, moe.top_k,
    )  # fmt: skip


def _finish(
    x: Tensor, attended: Tensor, valid: Tensor, alpha1: float, beta1: float, alpha2: float,
    beta2: float, norm: Tensor, eps: float, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The rest of a layer, after its attention: [N, W], and how unevenly its experts are used.

    All experts on all tokens, as one wide MLP: at these sizes sorting tokens costs more.
    """
    x = functional.rms_norm(_residual(x, attended, alpha1, beta1), norm.shape, norm, eps)
    logits = functional.linear(x, gate).float()
    probabilities, ranks = torch.softmax(logits, dim=-1), _ranks(logits)
    weights = probabilities * (ranks < top_k)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
    inner = functional.linear(x, w13.flatten(0, 1)).unflatten(-1, (len(w13), 2, -1))
    first, second = inner.unbind(2)  # NEF
    weighed = functional.silu(first) * second * weights[..., None]
    y = functional.linear(weighed.flatten(1), w2.transpose(0, 1).flatten(1))
    return _residual(x, y, alpha2, beta2), _imbalance(probabilities, ranks, valid)


def _residual(x: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    # Not torch.add(..., alpha=alpha): of a product, torch.compile (2.11, 2.13) leaves alpha out.
    return alpha * x + (y if beta == 1 else beta * y)


def _ranks(logits: Tensor) -> Tensor:
    """int64 [N, E], 0 for the largest, the first of equals first; topk is slow on short rows."""
    one, other = logits[:, :, None], logits[:, None]
    index = torch.arange(logits.shape[1], device=logits.device)
    return ((other > one) | ((other == one) & (index < index[:, None]))).sum(-1)


def _imbalance(probabilities: Tensor, ranks: Tensor, valid: Tensor) -> Tensor:
    """1 when all experts are as likely (Switch Transformer, arXiv 2101.03961, section 2.2).

    Not of padding: norms multiply the gradient of zeros by some hundred each.
    """
    weight = (valid / valid.sum())[:, None]
    chosen, likely = ((ranks == 0) * weight).sum(0), (probabilities * weight).sum(0)
    return probabilities.shape[1] * (chosen * likely).sum()
