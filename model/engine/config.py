"""How an engine is set up: what the user may choose, checked before any weight is read."""

import os
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch

from model.files import Folder
from model.layers.linear import Quantization
from model.layers.ragged import BLOCK_TOKENS
from schemas.errors import ConfigError

MOST_SEQUENCES = 384  # in memory at once, unless asked otherwise
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def usual_chunk_tokens(*, on_gpu: bool, ranks: int) -> int:
    """Of a microbatch, unless asked otherwise.

    On an H100 the experts take 1.33 us a token at 4,096 tokens, 1.21 at 8,192, 1.20 at 16,384. Of
    several ranks none but the first prompts make so many, and what they would be computed in holds
    7% more sequences: simulated, four ranks with 139 GiB each make 3 to 4% more of photographs and
    pages with 8,192. Smaller ones let the first sequences decode beside the last prompts, which
    saves one rank nothing: the last decodes as many steps, at nearly the same cost.
    """
    if not on_gpu:
        return 2048
    return 16384 if ranks == 1 else 8192


@dataclass(frozen=True)
class EngineConfig:
    """One engine: a whole model over `ranks` ranks.

    checkpoint: folder of the released layout, at a path or at any fsspec address.
    device: "auto" is cuda where there is one, else cpu; rank r of this machine takes GPU r.
    dtype: of activations and plain weights; "auto" is bfloat16 on cuda, float32 on cpu.
    chunk_tokens: most tokens, of prompts and decode together, in one microbatch.
    max_sequences: most sequences in memory at once. None: as memory allows, MOST_SEQUENCES at most.
    cache_bytes: memory of each rank for slots and blocks together. None: on cuda what is free
        after loading, less what a microbatch needs; on cpu 1 GiB.
    tokens_per_sequence: the mean length, answer included, for which that memory is split between
        slots and blocks. Longer sequences work too: they wait or are preempted sooner.
    ahead: plan a microbatch while the one before it is computed, on one rank. None: on cuda, where
        the device would wait for the host; a CPU would only compute tokens in vain.
    quantization: of the text model's weights. "int8-dynamic" rounds the inputs of their products
        to int8 too, a scale for each token, where that is faster (the prompts, on a Hopper GPU).
    random_weights: for measuring only: nothing is read from `checkpoint` but its JSON files.
    threads: CPU threads of each rank. None: the cores divided by `ranks`; with one rank, which
        runs inside the calling process, whatever is set there.
    hang_seconds: how long a rank in a process of its own may give no answer, or come no further,
        before it is given up for hung; vital_signs.py has the rule. Not how long work may take.

    Raises ConfigError for a value outside these.
    """

    checkpoint: str | Folder
    ranks: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Quantization = "int8"
    chunk_tokens: int = 16384
    max_sequences: int | None = None
    cache_bytes: int | None = None
    tokens_per_sequence: int = 4096
    ahead: bool | None = None
    random_weights: bool = False
    threads: int | None = None
    # A part of a layer takes a GPU 0.1 s at most, and while Triton compiles a kernel none counts.
    hang_seconds: int = 45

    def __post_init__(self) -> None:
        for field in ("device", "dtype", "quantization"):
            _expect_one_of(
                field, getattr(self, field), get_args(get_type_hints(EngineConfig)[field])
            )
        _expect_at_least("ranks", self.ranks, 1)
        # One block of a prompt always fits beside the decode tokens, or prompts could starve.
        _expect_at_least("chunk_tokens", self.chunk_tokens, 2 * BLOCK_TOKENS)
        _expect_at_least("tokens_per_sequence", self.tokens_per_sequence, 1)
        _expect_at_least("hang_seconds", self.hang_seconds, 2)
        for name in ("max_sequences", "cache_bytes", "threads"):
            if getattr(self, name) is not None:
                _expect_at_least(name, getattr(self, name), 1)

    @property
    def most_sequences(self) -> int:
        return self.max_sequences or MOST_SEQUENCES

    @property
    def threads_per_rank(self) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.ranks)

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    @property
    def plans_ahead(self) -> bool:
        return self.ranks == 1 and (self.on_cuda if self.ahead is None else self.ahead)

    def rank_device(self, gpu: int) -> torch.device:
        """Of a rank whose own GPU is number `gpu` of those that its process sees."""
        return torch.device("cuda", gpu) if self.on_cuda else torch.device("cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if self.on_cuda else torch.float32
        return DTYPES[self.dtype]

    def check_devices(self) -> None:
        """Raises ConfigError when this machine has fewer GPUs than there are ranks."""
        if not self.on_cuda:
            return
        found = torch.cuda.device_count()
        if not found:
            raise ConfigError("device is cuda, this machine has no GPU; use one, or device cpu")
        if found < self.ranks:
            raise ConfigError(
                f"ranks is {self.ranks}, this machine has {found} GPUs; every rank takes one: "
                f"expected 1 to {found} ranks"
            )


def _expect_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _expect_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}; expected {least} or more")
