"""Times of every kernel at VL-01's widths beside the card's own limits, measured in the same run.

`python -m tests.gpu.bench_kernels [linear] [experts] [attention] [norm]`: ms, TFLOP/s and TB/s (of
the bytes that must move once), and torch's bf16 product on the same sizes. Launches are replayed
from CUDA graphs, over several copies of a weight, so that neither the host nor the L2 cache
flatters a number.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch

from model.layers.kernels import (
    experts,
    int8_linear,
    lightning_attention,
    paged_attention,
    residual_norm,
)
from model.layers.memory import RECENT_TOKENS
from model.layers.ragged import BLOCK_TOKENS, RaggedBatch
from model.layers.states import States

HIDDEN, INNER, EXPERTS, HEADS, GROUPS, DIM = 6144, 9216, 32, 64, 8, 128
COPIES = 4  # 226 MB of one projection, against 50 MB of L2


def milliseconds(run: Callable[[int], object], seconds: float = 0.15) -> float:
    """Median time of run(i), i counting up, from graph replays over about `seconds`."""
    run(0)
    run(1)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run(0)
    end.record()
    torch.cuda.synchronize()
    runs = COPIES * max(1, min(8, int(1 / max(start.elapsed_time(end), 0.01))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(runs):
            run(i)
    times = []
    while sum(times) * runs < seconds * 1e3 or len(times) < 3:
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / runs)
    return statistics.median(times)


def ignoring_count(run: Callable[..., object], *arguments_and_count: object) -> object:
    return run(*arguments_and_count[:-1])


def report(name: str, ms: float, flops: float, read_and_written: float) -> None:
    print(
        f"{name:44s} {ms:9.4f} ms {flops / ms / 1e9:6.0f} TFLOP/s "
        f"{read_and_written / ms / 1e9:5.2f} TB/s",
        flush=True,
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def random_int8(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
    return weight, torch.rand(*shape[:-1], 1, device="cuda").to(torch.bfloat16) * 1e-3


def bench_limits() -> None:
    source = torch.empty(1 << 30, device="cuda", dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    ms = milliseconds(lambda _: target.copy_(source))
    report("copy of 4 GiB", ms, 0, 2 * 4 * source.numel())
    a, b = random(8192, 8192), random(8192, 8192)
    report("torch bf16 8192^3", milliseconds(lambda _: a @ b), 2 * 8192**3, 3 * 2 * 8192**2)


def bench_linear() -> None:
    for outputs, width, sizes in (
        (INNER, HIDDEN, (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192, 16384)),
        (3 * HEADS * DIM, HIDDEN, (16, 128, 8192)),
        (HIDDEN, HEADS * DIM, (16, 128, 8192)),
    ):
        weights = [random_int8(outputs, width) for _ in range(COPIES)]
        plain = [random(outputs, width) for _ in range(COPIES)]
        for tokens in sizes:
            x = random(tokens, width)
            flops = 2 * tokens * outputs * width
            moved = 2 * tokens * (outputs + width)
            name = f"[{outputs}, {width}] at {tokens}"
            ms = milliseconds(lambda i, x=x, w=weights: int8_linear(x, *w[i % COPIES]))
            report(f"int8 {name}", ms, flops, moved + outputs * width)
            if tokens > 256:
                ms = milliseconds(
                    lambda i, x=x, w=weights: int8_linear(x, *w[i % COPIES], quantize_x=True)
                )
                report(f"  int8 inputs {name}", ms, flops, moved + outputs * width)
            ms = milliseconds(lambda i, x=x, w=plain: x @ w[i % COPIES].T)
            report(f"  torch bf16 {name}", ms, flops, moved + 2 * outputs * width)


def bench_experts() -> None:
    w13, w2 = (
        random_int8(EXPERTS, 2 * INNER, HIDDEN),
        random_int8(EXPERTS, HIDDEN, INNER),
    )
    for tokens in (1, 16, 64, 128, 256, 512, 2048, 4096, 8192, 16384):
        x = random(tokens, HIDDEN)
        chosen = torch.rand(tokens, EXPERTS, device="cuda").topk(2).indices
        weights = torch.full((tokens, 2), 0.5, device="cuda")
        used = len(chosen.unique())
        flops = 2 * 2 * tokens * 3 * INNER * HIDDEN
        moved = used * 3 * INNER * HIDDEN + 2 * 2 * tokens * HIDDEN
        for quantize_x in (False, True) if tokens > 2048 else (False,):
            run = partial(experts, x, chosen, weights, *w13, *w2, quantize_x=quantize_x)
            name = f"experts{', int8 inputs' * quantize_x}, {tokens} tokens on {used}"
            report(name, milliseconds(partial(ignoring_count, run)), flops, moved)


def batch_of(lengths: list[int], contexts: list[int]) -> tuple[RaggedBatch, int]:
    tables, blocks = [], 0
    for length, context in zip(lengths, contexts, strict=True):
        needed = -(-(length + context) // BLOCK_TOKENS)
        tables.append(list(range(blocks, blocks + needed)))
        blocks += needed
    return RaggedBatch.build(lengths, contexts, range(len(lengths)), tables, "cuda"), blocks


def bench_attention() -> None:
    for lengths, contexts in (
        ([2400] * 7, [0] * 7),
        ([8064] * 2, [0] * 2),
        ([1] * 128, [2400] * 128),
        ([1] * 32, [8000] * 32),
        ([1] * 4, [8000] * 4),
    ):
        batch, blocks = batch_of(lengths, contexts)
        tokens, sequences = sum(lengths), len(lengths)
        name = f"{sequences} x {lengths[0]} new after {contexts[0]}"
        q, k, v = random(tokens, HEADS, 3 * DIM).split(DIM, dim=-1)
        slopes = torch.rand(HEADS, device="cuda")
        states = States.empty(sequences, HEADS, DIM, "cuda", packed=True)
        recent = random(sequences, HEADS, 2, RECENT_TOKENS, DIM)
        ms = milliseconds(
            partial(ignoring_count, lightning_attention, q, k, v, slopes, states, batch, recent)
        )
        flops = tokens * HEADS * 4 * DIM * DIM
        report(f"lightning {name}", ms, flops, 4 * q.numel() * 2 + 2 * states.data_SHKV.nbytes)
        pools = random(2, blocks, BLOCK_TOKENS, GROUPS, DIM)
        k, v = random(2, tokens, GROUPS, DIM)
        ms = milliseconds(partial(ignoring_count, paged_attention, q, k, v, *pools, batch))
        pairs = sum(n * c + n * (n + 1) / 2 for n, c in zip(lengths, contexts, strict=True))
        report(
            f"softmax {name}", ms, 4 * pairs * HEADS * DIM, 2 * q.numel() * 2 + pools.numel() * 2
        )


def bench_norm() -> None:
    for tokens in (128, 16384):
        x, y, weight = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)
        ms = milliseconds(partial(ignoring_count, residual_norm, x, y, 3.5, 1.0, weight, 1e-5))
        report(f"residual norm, {tokens} tokens", ms, 0, 3 * x.numel() * 2)


BENCHES = {
    "linear": bench_linear,
    "experts": bench_experts,
    "attention": bench_attention,
    "norm": bench_norm,
}

if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    bench_limits()
    for chosen_bench in sys.argv[1:] or BENCHES:
        BENCHES[chosen_bench]()
