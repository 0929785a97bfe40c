"""What is measured: workloads by name, and the arithmetic and the bytes that they need."""

from dataclasses import dataclass

import numpy as np

from model.config import TextConfig, VL01Config
from model.engine.cost import attention_weights, expert_weights
from schemas.requests import Request, Sampling


@dataclass(frozen=True)
class Workload:
    """`requests` at once, each of `prompt` tokens and exactly `new` tokens of answer."""

    name: str
    requests: int
    prompt: int
    new: int
    what: str = "requests"  # what one request stands for

    def make_requests(self, config: VL01Config) -> list[Request]:
        """Random text tokens, greedy; seeded, so always the same."""
        rng = np.random.default_rng(0)
        ids = rng.integers(
            0, config.text.vocab_size - 1, (self.requests, self.prompt), dtype=np.int32
        )
        ids += ids >= config.image_token_id  # any token but the image's
        sampling = Sampling(max_new_tokens=self.new)
        return [Request(str(i), row, sampling=sampling) for i, row in enumerate(ids)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("coco640x480", requests=128, prompt=2400, new=128, what="images"),
        Workload("page-a4", requests=32, prompt=8080, new=256, what="pages"),
        Workload("decode", requests=128, prompt=64, new=256),
    )
}


def flops(text: TextConfig, workload: Workload) -> float:
    """Of the network's matrix products; attention over past tokens is left out (under 2%)."""
    # The last token of an answer is never computed.
    computed = workload.requests * (workload.prompt + workload.new - 1)
    sampled = workload.requests * workload.new
    return computed * flops_per_token(text) + sampled * 2 * text.vocab_size * text.hidden_size


def flops_per_token(text: TextConfig) -> float:
    """Of one token through all layers, without the head."""
    moe = text.experts_per_token * expert_weights(text) + text.num_experts * text.hidden_size
    return 2 * sum(attention_weights(text, kind) + moe for kind in text.layer_types)


def step_bytes(text: TextConfig, sequences: int, context: int, weight_bytes: int) -> float:
    """What a decode step must move: all weights and the head read once, every state read and
    written, keys and values read. weight_bytes: of a quantized weight."""
    lightning = text.layer_types.count("lightning")
    softmax = text.layer_types.count("softmax")
    experts = min(text.num_experts, sequences * text.experts_per_token)
    expert = expert_weights(text)
    weights = sum(attention_weights(text, kind) + experts * expert for kind in text.layer_types)
    state = lightning * 2 * 4 * text.num_heads * text.head_dim**2
    cache = softmax * 2 * 2 * text.num_kv_heads * text.head_dim * context
    head = 2 * text.vocab_size * text.hidden_size
    return weight_bytes * weights + head + sequences * (state + cache)
