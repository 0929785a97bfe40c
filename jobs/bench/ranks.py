"""How a model's layers are split over ranks, and how busy each would be. Asks no GPU."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.bench.simulation import STREAMS, Simulated, mean_tokens, simulate, stream
from model.config import VL01Config
from model.engine.config import EngineConfig
from model.engine.memory import Capacity
from pipeline.estimate.gpus import capacity_estimate, rank_estimates
from schemas.estimate import RankEstimate

_GIB = 1024**3
_FILLS = 5  # times that a stream fills the memory: less and its middle is not like a long run


@dataclass(frozen=True)
class Foreseen:
    """capacity, simulated: by the name of the stream of requests."""

    ranks: tuple[RankEstimate, ...]
    capacity: dict[str, Capacity]
    simulated: dict[str, Simulated]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def foresee(model: VL01Config, engine: EngineConfig, gpu_bytes: int) -> Foreseen:
    """Raises ConfigError: more ranks than layers, GPUs that are too small."""
    ranks = rank_estimates(model, engine)
    capacity = {
        name: capacity_estimate(
            model, replace(engine, tokens_per_sequence=mean_tokens(name)), gpu_bytes
        )
        for name in STREAMS
    }
    simulated = {
        name: simulate(
            model,
            engine.ranks,
            capacity[name],
            stream(name, at_least=_FILLS * capacity[name].slots),
            chunk_tokens=engine.chunk_tokens,
        )
        for name in STREAMS
    }
    return Foreseen(ranks, capacity, simulated)


def show(foreseen: Foreseen) -> None:
    """A row for each rank; a column for each stream."""
    streams = foreseen.simulated
    table = Table("rank", "layers", "weights", "busy at most", *streams)
    for index, rank in enumerate(foreseen.ranks):
        table.add_row(
            str(index),
            f"{rank.first_layer} to {rank.last_layer}",
            f"{rank.weights / _GIB:,.1f} GiB",
            f"{rank.busy:.0%}",
            *(f"{each.steady[index]:.0%}" for each in streams.values()),
        )
    rates = (f"{each.rate:,.2f}/s" for each in streams.values())
    table.add_row("all", "", "", "", *rates)
    at_once = (f"{each.slots:,}" for each in foreseen.capacity.values())
    table.add_row("", "", "", "at once", *at_once)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"The last {len(streams)} columns are simulated, at the speed of the README's table for "
        "one H100; only a run measures."
    )
