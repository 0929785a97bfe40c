"""The training forward of a Decoder: whole pages and their answers at once, differentiable.

Computes what `Decoder` computes (a test compares the logits), from the same modules, but batched:
all pages of a batch have one layout, so nothing is padded but the ends of answers.

B pages, T tokens, H heads, G kv heads, D head dimensions,
W hidden size, C tokens of a chunk, M chunks, E experts, F inner dimensions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from model.decoder import Decoder
from model.inputs.tiling import Layout
from model.layers.activation import silu
from model.layers.lightning_attention import LightningAttention
from model.layers.linear import linear
from model.layers.moe import MixtureOfExperts
from model.layers.norm import gated_norm, residual_norm
from model.layers.rotary import rotary, rotary_tables
from model.vision.packing import pack

CHUNK = 64  # answers are padded to a multiple of it

# What a layer hands on to the answers: a lightning state [B, H, D, D], or keys and values
# [B, T, G, D] of the prompt.
Memory = Any


@dataclass(frozen=True)
class LayerOutput:
    """hidden [B, T, W]; memory after the last token; probabilities [B, T, E] of the experts; the
    queries [B, T, H, D] and all keys [B, T', G, D] of a softmax layer."""

    hidden: Tensor
    memory: Memory
    routing: Tensor
    queries_and_keys: tuple[Tensor, Tensor] | None = None


def embed_pages(
    decoder: Decoder, pixels_BNSSC: Tensor, layout: Layout, prefix_ids: Sequence[int]
) -> Tensor:
    """Embeddings of everything before the question: [B, T, W]. Pixels are normalised."""
    pages, tiles = pixels_BNSSC.shape[:2]
    features = decoder.vision_tower(pixels_BNSSC.flatten(0, 1))
    projected = decoder.projector(features.flatten(0, 1)).view(pages, tiles, features.shape[1], -1)
    packed = torch.stack([pack(page, decoder.image_newline, layout) for page in projected])
    ids = torch.tensor(prefix_ids, device=packed.device)
    prefix = decoder.embed_tokens(ids).expand(pages, -1, -1)
    return torch.cat([prefix, packed], dim=1)


def whole_chunks(embedded: Tensor) -> tuple[Tensor, int]:
    """With as many tokens of zeros in front as make its length a multiple of CHUNK, and how many.

    No projection of the language model has a bias: what is zero stays zero in every layer, and
    leaves the lightning states at zero.
    """
    padding = -embedded.shape[1] % CHUNK
    return functional.pad(embedded, (0, 0, padding, 0)), padding


class Runner:
    """Runs all layers, over pages or over the questions that follow them.

    `compiled`: what lies between two products through torch.compile. Batches differ in every
    size, so it is told at once that they do: compiling takes longer than some hundred batches.
    """

    def __init__(self, decoder: Decoder, *, compiled: bool = False) -> None:
        self._decoder = decoder
        self._lightning, self._finish = _lightning, _finish
        if compiled:
            # Of torch 2.11: with it, symbolic sizes end in an AssertionError of get_pw_red_splits.
            inductor_config.triton.coalesce_tiling_analysis = False
            self._lightning = torch.compile(_lightning, dynamic=True)
            self._finish = torch.compile(_finish, dynamic=True)

    def __call__(
        self,
        hidden: Tensor,
        memories: Sequence[Memory] | None = None,
        start: int = 0,
        padding: int = 0,
    ) -> list[LayerOutput]:
        """What every layer gives. Without memories, tokens begin a text, after `padding` tokens of
        zeros; with them, they go on at position `start` from what the layers gave for their page.
        Raises ValueError when they are no whole chunks."""
        if hidden.shape[1] % CHUNK:
            raise ValueError(f"{hidden.shape[1]} tokens; expected a multiple of {CHUNK}")
        outputs = []
        for i, layer in enumerate(self._decoder.layers.values()):
            memory = memories[i] if memories else None
            output = self._run(layer, hidden, memory, start, padding)
            hidden = output.hidden
            outputs.append(output)
        return outputs

    def _run(
        self, layer: Any, x: Tensor, memory: Memory | None, start: int, padding: int
    ) -> LayerOutput:
        # Norms multiply the gradient of zeros by some hundred each: routing must not send them any.
        if isinstance(layer.attention, LightningAttention):
            if memory is None:
                shape = (len(x), layer.attention.heads, *2 * (layer.attention.head_dim,))
                memory = torch.zeros(shape, device=x.device)
            hidden, memory, routing = self._lightning(layer, x, memory)
            return LayerOutput(hidden, memory, routing[:, padding:])
        x = layer.input_layernorm(x)
        attended, memory, pointers = _softmax(layer.attention, x[:, padding:], memory, start)
        attended = functional.pad(attended, (0, 0, padding, 0))
        hidden, routing = self._finish(layer, x, attended)
        return LayerOutput(hidden, memory, routing[:, padding:], pointers)


def _finish(layer: Any, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    norm, residual = layer.post_attention_layernorm, layer.moe_residual
    x = residual_norm(x, attended, layer.attention_residual, norm.weight, norm.eps)
    y, routing = _experts(layer.moe, x)
    return residual.alpha * x + residual.beta * y, routing


def _flat(module: Callable, x: Tensor, **how: bool) -> Tensor:
    """The project's Linear takes tokens in one row."""
    return module(x.flatten(0, 1), **how).unflatten(0, x.shape[:2])


def _lightning(layer: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A whole layer: hidden, state, routing."""
    x = layer.input_layernorm(x)
    attention = layer.attention
    qkv = _flat(attention.qkv_proj, x, silu=True)
    qkv = qkv.unflatten(-1, (attention.heads, 3 * attention.head_dim))
    q, k, v = qkv.split(attention.head_dim, dim=-1)
    o, state = lightning(q, k, v, attention.slopes_H, state)
    gate = _flat(attention.output_gate, x)
    norm = attention.norm
    attended = _flat(attention.out_proj, gated_norm(o.flatten(2), gate, norm.weight, norm.eps))
    hidden, routing = _finish(layer, x, attended)
    return hidden, state, routing


def lightning(
    q: Tensor, k: Tensor, v: Tensor, slopes_H: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of `lightning_attention` in parallel over chunks: [B, T, H, D], final state.

    The states before all chunks are one product of the chunks' updates with a matrix of decays.
    T must be whole chunks.
    """
    q, k, v = (x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4) for x in (q, k, v))  # BHMCD
    at = torch.arange(CHUNK, device=q.device)
    chunks = torch.arange(q.shape[2] + 1, device=q.device)
    slopes = slopes_H[:, None, None]
    inside = _decay(slopes, at[:, None] - at)  # [H, C, C]
    since_start = _decay(slopes, at[:, None] + 1)  # [H, C, 1]
    until_end = _decay(slopes, CHUNK - 1 - at[:, None])
    between = _decay(slopes, CHUNK * (chunks[:, None] - 1 - chunks[:-1]))  # [H, M + 1, M]
    update = ((k * until_end[:, None].to(k.dtype)).transpose(-1, -2) @ v).float()
    states = torch.einsum("hmn,bhnkv->bhmkv", between, update)
    carried = torch.exp(-slopes * CHUNK * chunks)[:, 0, :, None, None]  # [H, M + 1, 1, 1]
    states = states + carried * state[:, :, None]
    weights = (q @ k.transpose(-1, -2)) * inside[:, None].to(q.dtype)
    o = weights @ v + (q * since_start[:, None].to(q.dtype)) @ states[:, :, :-1].to(q.dtype)
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2), states[:, :, -1]


def _decay(slopes: Tensor, distance: Tensor) -> Tensor:
    """exp(-slope * distance), 0 for what lies ahead."""
    return torch.exp(-slopes * distance.clamp(min=0)) * (distance >= 0)


def _softmax(
    attention: Any, x: Tensor, memory: tuple[Tensor, Tensor] | None, start: int
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    qkv = _flat(attention.qkv_proj, x).split(attention.widths, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in qkv)
    positions = start + torch.arange(x.shape[1], device=x.device)
    cos, sin = rotary_tables(positions, attention.rotary_dim, attention.rope_theta)
    q = rotary(q.flatten(0, 1), *_tiled(len(x), cos, sin)).view(q.shape)
    k = rotary(k.flatten(0, 1), *_tiled(len(x), cos, sin)).view(k.shape)
    if memory is not None:
        k, v = torch.cat([memory[0], k], dim=1), torch.cat([memory[1], v], dim=1)
    o = _attend(q, k, v)
    return _flat(attention.out_proj, o.flatten(2)), (k, v), (q, k)


def _tiled(times: int, *tables: Tensor) -> tuple[Tensor, ...]:
    return tuple(table.repeat(times, 1) for table in tables)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal; the last query stands at the last key."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (
        x.transpose(1, 2)
        for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))
    )
    if q.shape[2] == k.shape[2]:
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask: Any = causal_lower_right(q.shape[2], k.shape[2])
        o = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o.transpose(1, 2)


def _experts(moe: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor]:
    """All experts on all tokens, as one wide MLP: at these sizes sorting tokens costs more."""
    probabilities = torch.softmax(_flat(moe.gate, x).float(), dim=-1)
    weights_E = _largest(probabilities, moe.top_k)
    inner = linear(x.flatten(0, 1), moe.w13.flatten(0, 1)).view(*x.shape[:2], len(moe.w13), -1)
    gate, up = inner.chunk(2, dim=-1)
    weighed = silu(gate) * up * weights_E[..., None].to(x.dtype)
    w2 = moe.w2.permute(1, 0, 2).flatten(1)
    y = linear(weighed.flatten(2).flatten(0, 1), w2).view(x.shape)
    return y, probabilities


def _largest(probabilities: Tensor, count: int) -> Tensor:
    """`route` as weights of all experts, 0 for those not chosen; topk is slow on short rows."""
    least, rest = probabilities, probabilities
    for _ in range(count):
        least = rest.amax(dim=-1, keepdim=True)
        rest = rest.masked_fill(rest >= least, -1)
    chosen = probabilities * (probabilities >= least)
    return chosen / chosen.sum(dim=-1, keepdim=True)
