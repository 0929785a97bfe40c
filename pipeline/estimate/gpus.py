"""Whether a replica fits its GPUs, and how many sequences then run at once. Asks no GPU."""

from dataclasses import dataclass

from model.config import TextConfig, VL01Config
from model.engine.config import EngineConfig, usual_chunk_tokens
from model.engine.cost import weight_bytes
from model.engine.memory import Capacity, Room, share_out
from model.engine.ranks import busy_shares, layer_spans
from model.engine.sequence import blocks_for
from model.layers.memory import block_bytes, slot_bytes
from model.layers.ragged import BLOCK_TOKENS
from pipeline.model import model_folder
from schemas.errors import ConfigError
from schemas.estimate import MemoryEstimate, RankEstimate
from schemas.job import Job

_GIB = 1024**3
# CUDA's context and the kernels 1 GiB; NCCL's buffers and fragmentation another.
_RUNTIME_BYTES = 2 * _GIB
_LOGITS_COPIES = 6  # fp32 logits, and what sampling makes of them: softmax, sorted, indices, sums


def engine_config(job: Job) -> EngineConfig:
    """As a run on GPUs (or on CPUs, if that is asked for) sets it up. Raises ConfigError."""
    on_cpu = job.device == "cpu"
    return EngineConfig(
        checkpoint=model_folder(job),
        ranks=job.pp,
        device="cpu" if on_cpu else "cuda",
        dtype=job.dtype,
        quantization=job.quantization,
        chunk_tokens=job.chunk_tokens or usual_chunk_tokens(on_gpu=not on_cpu, ranks=job.pp),
        max_sequences=job.max_sequences,
        cache_bytes=None if job.cache_gib is None else int(job.cache_gib * _GIB),
    )


def mean_tokens(prompt_tokens: float, job: Job) -> int:
    """Of a sequence, for which memory is shared out: answers are taken to be half as long as they
    may be, as --max-new-tokens leaves room for the long ones. Without any prompt, as the engine
    has it."""
    if not prompt_tokens:
        return EngineConfig.tokens_per_sequence
    return round(prompt_tokens + job.max_new_tokens / 2)


def memory_estimate(model: VL01Config, engine: EngineConfig, gpu_bytes: int) -> MemoryEstimate:
    """One replica on GPUs of `gpu_bytes`, with sequences as long as `engine` says on average.

    Raises ConfigError when weights and states do not fit, naming how many ranks would do.
    """
    ranks = _ranks(model, engine, engine.ranks)
    capacity = capacity_estimate(model, engine, gpu_bytes)
    blocks = blocks_for(engine.tokens_per_sequence)
    return MemoryEstimate(
        gpus=engine.ranks,
        gpu=gpu_bytes,
        weights=max(rank.weights for rank in ranks),
        reserve=max(rank.reserve for rank in ranks),
        sequence=max(rank.slot for rank in ranks),
        token=max(rank.block for rank in ranks) // BLOCK_TOKENS,
        sequences=max(1, min(capacity.slots, capacity.blocks // blocks)),
    )


def capacity_estimate(model: VL01Config, engine: EngineConfig, gpu_bytes: int) -> Capacity:
    """Slots and blocks of one replica. Raises ConfigError as `memory_estimate` does."""
    capacity = _capacity(_ranks(model, engine, engine.ranks), engine, gpu_bytes)
    if capacity is None:
        raise ConfigError(_too_small(model, engine, gpu_bytes))
    return capacity


def rank_estimates(model: VL01Config, engine: EngineConfig) -> tuple[RankEstimate, ...]:
    """How the layers are split, and on GPUs how evenly."""
    spans = layer_spans(model, engine.ranks)
    ranks = _ranks(model, engine, engine.ranks)
    busy = busy_shares(model, spans) if engine.on_cuda else (None,) * len(spans)
    return tuple(
        RankEstimate(span.start, span.stop - 1, rank.weights, share)
        for span, rank, share in zip(spans, ranks, busy, strict=True)
    )


@dataclass(frozen=True)
class _Rank:
    """Bytes: of the weights, of what computing takes, of one slot and one block."""

    weights: int
    reserve: int
    slot: int
    block: int


def _ranks(model: VL01Config, engine: EngineConfig, count: int) -> list[_Rank]:
    spans = layer_spans(model, count)
    dtype, int8 = engine.torch_dtype, engine.quantization != "none"
    return [
        _Rank(
            weights=weight_bytes(model, span, int8=int8, itemsize=dtype.itemsize),
            reserve=_reserve(model.text, engine, is_last=span is spans[-1]),
            slot=slot_bytes(model.text, span, dtype, packed=dtype.itemsize == 2),
            block=block_bytes(model.text, span, dtype),
        )
        for span in spans
    ]


def _reserve(text: TextConfig, engine: EngineConfig, is_last: bool) -> int:
    """For one microbatch of the largest size: most of it is the experts' input and output."""
    token = 4 * text.hidden_size
    token += text.experts_per_token * (2 * text.hidden_size + 3 * text.intermediate_size)
    needed = _RUNTIME_BYTES + engine.chunk_tokens * token * engine.torch_dtype.itemsize
    if is_last:
        needed += engine.most_sequences * text.vocab_size * 4 * _LOGITS_COPIES
    return needed


def _capacity(ranks: list[_Rank], engine: EngineConfig, gpu_bytes: int) -> Capacity | None:
    """None when not even one sequence fits."""
    rooms = []
    for rank in ranks:
        free = gpu_bytes - rank.weights - rank.reserve
        rooms.append(Room(min(engine.cache_bytes or free, free), rank.slot, rank.block))
    try:
        return share_out(rooms, engine.most_sequences, engine.tokens_per_sequence)
    except ConfigError:
        return None


def _too_small(model: VL01Config, engine: EngineConfig, gpu_bytes: int) -> str:
    ranks = _ranks(model, engine, engine.ranks)
    fullest = max(ranks, key=lambda rank: rank.weights + rank.reserve)
    more = range(engine.ranks + 1, model.text.num_layers + 1)
    enough = next((n for n in more if _capacity(_ranks(model, engine, n), engine, gpu_bytes)), None)
    advice = (
        f"--pp {enough} would do" if enough else "larger GPUs or --quantization int8 are needed"
    )
    cache = " and --cache-gib allows for them" if engine.cache_bytes else ""
    return (
        f"a GPU of {gpu_bytes / _GIB:,.0f} GiB (--gpu-memory-gib) is too small: with --pp "
        f"{engine.ranks} a rank has {fullest.weights / _GIB:,.1f} GiB of weights, computing takes "
        f"{fullest.reserve / _GIB:,.1f} GiB, and one sequence must fit beside them{cache}; {advice}"
    )
