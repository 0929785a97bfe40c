"""What layers, vision and head cost on a GPU: seconds and bytes, reckoned from a model's sizes.

T tokens through W weights take hypot(2 T W / rates.flops, bytes of W / rates.bytes): many tokens
are bound by arithmetic, few by memory, and where both are alike they add up like the sides of a
right angle. (The experts of a layer take 2.7 ms at 1,024 tokens on an H100; 1.4 and 2.1 make 2.5.)

The rates are such that the real scheduler, simulated with these costs, comes within 2.5% of the
seconds of all three workloads in README, "Measured" (8 layers, int8, one H100): 77% of that card's
bf16 product, 90% of its copy. How fast vision is was not measured alone; the same rates are
assumed. With it, and at full power for longer, 96 pages took 19.3 s where 18.3 are reckoned, and
768 photographs, 384 at once, 44.8 s where 37.0 are.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, prod

from model.config import LayerType, TextConfig, VL01Config
from model.engine.plan import Segment
from model.layers.memory import RECENT_TOKENS
from model.weights.names import checkpoint_tensors

_BF16, _FP32 = 2, 4
# Of a number of a lightning state, for a token: 16 bits are read, and written for one in so many;
# meanwhile the keys and values of these wait beside 128 x 128 numbers.
_STATE_BYTES = _BF16 + _BF16 / RECENT_TOKENS + 2 * RECENT_TOKENS * _BF16 / 128
_LOGITS_PASSES = 6  # fp32 logits are written, and read and written again until a token is chosen


@dataclass(frozen=True)
class Rates:
    """flops: of products, a second. bytes: read or written, a second."""

    flops: float = 6.00e14
    bytes: float = 2.70e12


@dataclass(frozen=True)
class Work:
    """What one microbatch asks of the ranks; a mean may have fractions.

    tokens: all that are computed. decoding: those of answers among them. pairs: of a prompt's token
    and one that it attends to. contexts: tokens in memory that decoding ones attend to.
    sampled: tokens chosen. tiles: seen.
    """

    tokens: float
    decoding: float = 0.0
    pairs: float = 0.0
    contexts: float = 0.0
    sampled: float = 0.0
    tiles: float = 0.0

    @classmethod
    def of(cls, segments: Sequence[Segment], tiles: int = 0) -> "Work":
        decoding = [segment for segment in segments if segment.is_decode]
        chunks = [segment for segment in segments if not segment.is_decode]
        return cls(
            tokens=sum(segment.length for segment in segments),
            decoding=len(decoding),
            pairs=sum(chunk.length * (chunk.context + chunk.length / 2) for chunk in chunks),
            contexts=sum(segment.context for segment in decoding),
            sampled=sum(segment.samples for segment in segments),
            tiles=tiles,
        )


# Photographs of 640x480 come and go: 5 tiles, 2,400 prompt tokens and 128 of answer each. While 64
# sequences decode a token (256 in memory, over 4 microbatches) half a photograph takes the place of
# the half that ends.
TYPICAL = Work(
    tokens=64 + 1200,
    decoding=64,
    pairs=1200 * 1200,
    contexts=64 * 2464,
    sampled=64.5,
    tiles=2.5,
)


class Cost:
    """Seconds of one model, with its quantized weights in int8 and the others in bf16."""

    def __init__(self, model: VL01Config, rates: Rates = Rates()) -> None:
        self._text, self._vision, self._rates = model.text, model.vision, rates

    def seconds(self, span: range, work: Work) -> float:
        """Of the rank that holds the layers in `span`."""
        kinds: Counter[LayerType] = Counter(self._text.layer_types[layer] for layer in span)
        seconds = sum(count * self.layer(kind, work) for kind, count in kinds.items())
        if 0 in span:
            seconds += self.vision(work.tiles)
        if self._text.num_layers - 1 in span:
            seconds += self.head(work.sampled)
        return seconds

    def layer(self, kind: LayerType, work: Work) -> float:
        attention = self._weights(attention_weights(self._text, kind), work.tokens)
        remembered = self._lightning(work) if kind == "lightning" else self._softmax(work)
        return attention + remembered + self._experts(work.tokens)

    def vision(self, tiles: float) -> float:
        """Tower and projector, for the first rank."""
        vision, hidden = self._vision, self._text.hidden_size
        width, patches = vision.hidden_size, vision.patches_per_side**2
        weights = vision.num_layers * (4 * width**2 + 2 * width * vision.intermediate_size)
        weights += hidden * (width + hidden)
        attention = vision.num_layers * 4 * patches * width
        return tiles * patches * (2 * weights + attention) / self._rates.flops

    def head(self, sampled: float) -> float:
        """Logits and the choice of tokens, for the last rank."""
        if not sampled:
            return 0.0
        text = self._text
        logits_bytes = _LOGITS_PASSES * _FP32 * sampled * text.vocab_size
        weights = text.vocab_size * text.hidden_size
        return self._weights(weights, sampled, _BF16) + logits_bytes / self._rates.bytes

    def _experts(self, tokens: float) -> float:
        text, rates = self._text, self._rates
        expert = expert_weights(text)
        # An expert is read if any token chose it; the choices are taken to fall at random.
        chosen = 1 - (1 - text.experts_per_token / text.num_experts) ** tokens
        return hypot(
            2 * tokens * text.experts_per_token * expert / rates.flops,
            chosen * text.num_experts * expert / rates.bytes,
        )

    def _lightning(self, work: Work) -> float:
        """A prompt's token adds its key times its value to the state, and asks it; in decode the
        state is read, and now and then written."""
        state = self._text.num_heads * self._text.head_dim**2
        prompts = 4 * (work.tokens - work.decoding) * state / self._rates.flops
        return prompts + _STATE_BYTES * work.decoding * state / self._rates.bytes

    def _softmax(self, work: Work) -> float:
        text, rates = self._text, self._rates
        prompts = 4 * work.pairs * text.num_heads * text.head_dim / rates.flops
        cached = 2 * _BF16 * text.num_kv_heads * text.head_dim
        return prompts + work.contexts * cached / rates.bytes

    def _weights(self, weights: int, tokens: float, weight_bytes: int = 1) -> float:
        rates = self._rates
        return hypot(2 * weights * tokens / rates.flops, weights * weight_bytes / rates.bytes)


def attention_weights(text: TextConfig, kind: LayerType) -> int:
    """qkv, output gate and output projection; q, k and v, and output projection."""
    width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    rows = 5 * width if kind == "lightning" else 2 * width + 2 * kv_width
    return rows * text.hidden_size


def expert_weights(text: TextConfig) -> int:
    """Of one expert."""
    return 3 * text.intermediate_size * text.hidden_size


def weight_bytes(
    model: VL01Config, span: range, *, int8: bool = True, itemsize: int = _BF16
) -> int:
    """That the rank with these layers holds. itemsize: of a weight that is not quantized."""
    total = 0
    for entry in checkpoint_tensors(model, span):
        if entry.quantized and int8:
            total += prod(entry.shape) + entry.shape[0] * _BF16  # and the scales
        else:
            total += prod(entry.shape) * itemsize
    return total
