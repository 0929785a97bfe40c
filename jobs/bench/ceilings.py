"""What this device can do at best, measured: the rates that a share is a share of."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ceilings:
    """matmul: FLOP/s of a large product (bf16, n^3). copy: bytes/s read and written together."""

    matmul: float
    copy: float


@torch.inference_mode()
def measure_ceilings(device: torch.device) -> Ceilings:
    """A bf16 8192^3 product and a copy of 4 GiB; on a CPU much smaller ones, in fp32."""
    if device.type != "cuda":
        return Ceilings(_matmul(512, torch.float32, device), _copy(2**24, device))
    ceilings = Ceilings(_matmul(8192, torch.bfloat16, device), _copy(2**32, device))
    torch.cuda.empty_cache()
    return ceilings


def _matmul(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: a @ b, device)


def _copy(size: int, device: torch.device) -> float:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Of one run: the median over `rounds` of ten in a row."""
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(10):
            run()
        synchronize(device)
        times.append((time.perf_counter() - started) / 10)
    return statistics.median(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
