"""Where the time of a run on a GPU goes: kernels, gathered into the families of layers."""

from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# A kernel belongs to the first family one of whose words is in its name.
_FAMILIES = {
    "int8 inputs": ("_to_int8",),
    "MoE": ("_gate_up", "_down", "_sum_choices", "_rows", "_tiles", "_route",
            "softmax_warp", "TopK", "bitonicSort"),
    "projections": ("_product", "_sum_parts", "_linear"),
    "lightning": ("_lightning_",),
    "softmax": ("_softmax_", "_write_keys_values", "_join_parts", "_rotary"),
    "router and head": ("gemm", "nvjet", "cutlass", "splitK", "gemv"),
    "sampling": ("SoftMax", "ArgMax"),
}  # fmt: skip
_REST = "norms and the rest"
IDLE = "idle"


def seconds_by_family(run: Callable[[], object]) -> tuple[dict[str, float], list[str]]:
    """Seconds of each family in one run of `run`, idle included, and a line for each of the
    kernels that take longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return gather(
        [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type.name == "CUDA"
        ]
    )


def gather(kernels: list[tuple[str, float, float]]) -> tuple[dict[str, float], list[str]]:
    """The same from (name, start, end) in microseconds of every kernel."""
    by_name: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    seconds = dict.fromkeys([*_FAMILIES, _REST, IDLE], 0.0)
    free_from = min((start for _, start, _ in kernels), default=0.0)
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        seconds[IDLE] += max(0.0, start - free_from) / 1e6
        seconds[family(name)] += (end - start) / 1e6
        free_from = max(free_from, end)
        by_name[name] += end - start
        calls[name] += 1
    longest = [
        f"{time / 1e6:8.3f} s  {calls[name]:6d} x {time / calls[name]:8.1f} us  {name[:90]}"
        for name, time in sorted(by_name.items(), key=lambda item: -item[1])[:25]
    ]
    return seconds, longest


def family(name: str) -> str:
    for family, words in _FAMILIES.items():
        if any(word in name for word in words):
            return family
    return _REST
