"""What `vl01 plan` says: the estimate in lines for a person, or as JSON for a program."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from jobs.show import growth
from pipeline.progress import count, endings
from schemas.errors import ConfigError
from schemas.estimate import Estimate, MemoryEstimate, RankEstimate, RowsEstimate, Spread

HELP = """Tell what a run will do, before any GPU starts. Writes nothing to OUT.

Takes the arguments of the run, or its job file. Lists the source and reads
the headers of its images (of a sample of 1,024 where there are more),
checks all that a run checks, and shows rows, tiles, prompt tokens, memory,
hours and price. Of a source that grows it tells what is new.

The speed is that of an earlier run on OUT with as many ranks and replicas;
else, for GPUs and the released model, that of the table that comes with the
project. --bench and --tokens-per-second know better. It says which it took.
No cluster is asked: --replicas auto counts as 1 where no run tells more.

[bold]Examples[/bold]
  vl01 plan job.yaml
  vl01 plan caption photos --output captions --model /models/vl01 --pp 8
  vl01 plan job.yaml --bench slice.json --gpu-hour-price 2.5
  vl01 plan job.yaml --json - | jq .prompt_tokens.total

[bold]Exit codes[/bold]
  0  the run can start
  2  it cannot: the message says why"""

_GIB = 1024**3
_MIB = 1024**2
_KINDS = {
    "images": "image file{s}",
    "documents": "page{s} of documents",
    "tar": "in tars",
    "parquet": "in Parquet files",
    "list": "in lists",
}


def write_json(plan: Estimate, path: str) -> None:
    """path: a file, or - for standard output. Raises ConfigError."""
    text = json.dumps(asdict(plan), indent=1) + "\n"
    if path == "-":
        print(text, end="")
        return
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write --json {path}: {error.strerror}") from error


def show_plan(plan: Estimate) -> None:
    rows = sum(kind.rows for kind in plan.rows.values())
    facts = {
        "source": plan.source,
        "new": growth(plan.growth) if plan.growth else "",
        "output": f"{plan.output}{_done(plan)}",
        "rows": _rows(plan.rows) if rows else "nothing is left to do",
        "unread": f"{endings(plan.unread)}: files that are left out for their names"
        if plan.unread
        else "",
    }
    if rows:
        facts |= {
            "failing": _counted(plan.reasons),
            "headers": _headers(plan),
            "tiles": _spread(plan.tiles),
            "prompts": f"{_spread(plan.prompt_tokens)} tokens",
            "ranks": _ranks(plan.ranks) if len(plan.ranks) > 1 else "",
            "memory": _memory(plan.memory) if plan.memory else "not reckoned: the run is on CPU",
            "speed": _speed(plan),
            "time": _time(plan),
        }
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    for name, value in facts.items():
        if value:
            console.print(f"[bold]{name:<8}[/] {escape(value)}")


def _done(plan: Estimate) -> str:
    units = f" ({count(plan.units, 'unit')} to do"
    return units + (f", {plan.units_done:,} are done)" if plan.units_done else ")")


def _rows(kinds: dict[str, RowsEstimate]) -> str:
    parts = [
        f"{'' if kind.rows_known else 'about '}{kind.rows:,} "
        + _KINDS[name].format(s="" if kind.rows == 1 else "s")
        for name, kind in kinds.items()
    ]
    if len(parts) == 1:
        return parts[0]
    about = "" if all(kind.rows_known for kind in kinds.values()) else "about "
    return f"{about}{sum(kind.rows for kind in kinds.values()):,}: {', '.join(parts)}"


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def _headers(plan: Estimate) -> str:
    read = sum(kind.headers for kind in plan.rows.values())
    if plan.exact:
        return f"all {read:,} were read: what follows is exact, but for damage behind a header"
    return f"{read:,} were read, at random: what follows is an estimate"


def _spread(spread: Spread) -> str:
    return f"{spread.total:,} in all; median {spread.median:,}, 95th percentile {spread.p95:,}"


def _ranks(ranks: Sequence[RankEstimate]) -> str:
    parts = [
        f"{rank.first_layer} to {rank.last_layer} ({rank.weights / _GIB:,.1f} GiB"
        f"{'' if rank.busy is None else f', {rank.busy:.0%}'})"
        for rank in ranks
    ]
    busy = "" if ranks[0].busy is None else " and the most it can be busy"
    return f"{len(ranks)} in a replica, by layers, with weights{busy}: {', '.join(parts)}"


def _memory(memory: MemoryEstimate) -> str:
    gpus = f"{memory.gpus} GPU{'s' if memory.gpus > 1 else ''} of {memory.gpu / _GIB:,.0f} GiB"
    return (
        f"a replica takes {gpus} (--gpu-memory-gib): {memory.weights / _GIB:,.1f} GiB of weights "
        f"on the fullest, {memory.reserve / _GIB:,.1f} GiB kept for computing; a sequence takes "
        f"{memory.sequence / _MIB:,.1f} MiB and {memory.token / 1024:,.1f} KiB a token: "
        f"{memory.sequences:,} run at once"
    )


def _speed(plan: Estimate) -> str:
    if (speed := plan.throughput) is None:
        return "not known: no such run on OUT yet; give --bench or --tokens-per-second"
    return (
        f"{speed.tokens_per_second:,.0f} tokens/s, {speed.output_tokens:,.0f} written for a row "
        f"({speed.origin})"
    )


def _time(plan: Estimate) -> str:
    if (time := plan.time) is None:
        return ""
    parts = [_clock(time.seconds)]
    if time.gpu_hours is not None:
        parts.append(f"{time.gpu_hours:,.2f} GPU-hours")
    if time.price is not None:
        parts.append(f"{time.price:,.2f} at {plan.assumptions.gpu_hour_price:,g} per GPU-hour")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
