"""What `vl01 plan` foretells of a run: its rows, tiles and tokens, its memory, time and price."""

from dataclasses import dataclass, field

from schemas.ledger import Growth


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot find out by itself.

    tokens_per_second: read and written, by all replicas together. bench: a file that tells how fast
    it goes: what `vl01 bench slice --json` wrote, or the report.json of another output. Without
    either, the speed is that of the last run, or of the table that comes with the project.
    """

    gpu_memory_gib: float = 80.0
    gpu_hour_price: float | None = None
    tokens_per_second: float | None = None
    bench: str | None = None


@dataclass(frozen=True)
class RowsEstimate:
    """The rows of one kind of unit that are still to do.

    rows_known: counted, not estimated from a sample. headers: of how many the header was read.
    failed: have no usable image, as far as headers tell. pages: some of them are of documents.
    """

    units: int
    rows: int
    rows_known: bool
    headers: int
    failed: int
    pages: bool


@dataclass(frozen=True)
class Spread:
    """Of a count per row, over the rows whose image is usable."""

    median: int
    p95: int
    total: int


@dataclass(frozen=True)
class MemoryEstimate:
    """One replica on its GPUs, in bytes; of the rank that has the most of each.

    reserve: for computing one microbatch, and what CUDA and NCCL take. sequence: the states of one
    sequence. token: its K/V, for each token. sequences: of the mean length, that run at once.
    """

    gpus: int
    gpu: int
    weights: int
    reserve: int
    sequence: int
    token: int
    sequences: int


@dataclass(frozen=True)
class RankEstimate:
    """One rank of a replica: its layers, and the bytes of its weights.

    busy: the share of time in which it computes if the slowest rank always does, for photographs
    of 640x480 with answers of 128 tokens; no rank is busier in a steady run. None on CPU.
    """

    first_layer: int
    last_layer: int
    weights: int
    busy: float | None


@dataclass(frozen=True)
class Throughput:
    """tokens_per_second: read and written, by all replicas together; on no GPUs on CPU.

    output_tokens: written for a row; a mean, or the most there can be. origin: who says so.
    start_seconds: before the first rows come, where that is known; 0 else.
    """

    tokens_per_second: float
    output_tokens: float
    gpus: int
    origin: str
    start_seconds: float = 0.0


@dataclass(frozen=True)
class TimeEstimate:
    """gpu_hours and price: None where no GPU is used, or its price is not known."""

    seconds: float
    gpu_hours: float | None
    price: float | None


@dataclass(frozen=True)
class Estimate:
    """units: still to do; units_done: of those planned, done by earlier runs on this output, and
    not to be done again.

    unread: files of a source not planned before that are left out for their names, by ending.
    growth: what the source has grown by since it was planned; None if the job does not say so.
    rows: by kind of unit. exact: every header was read, so that only damage behind the headers is
    not foretold. reasons: of the rows that will fail. ranks: of each replica, in order. memory:
    None when the run is asked to use no GPU. time: None when no throughput is known.
    """

    source: str
    output: str
    units: int
    units_done: int
    rows: dict[str, RowsEstimate]
    exact: bool
    reasons: dict[str, int]
    tiles: Spread
    prompt_tokens: Spread
    unread: dict[str, int] = field(default_factory=dict)
    growth: Growth | None = None
    ranks: tuple[RankEstimate, ...] = ()
    memory: MemoryEstimate | None = None
    throughput: Throughput | None = None
    time: TimeEstimate | None = None
    assumptions: Assumptions = field(default_factory=Assumptions)
