"""What `vl01 status` says."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pipeline.progress import count

if TYPE_CHECKING:
    from pipeline.status import Status

HELP = """Show how far a run is and who is running it, from any machine.

Reads the records in OUT/_vl01 and changes nothing. With more than 2,000
units done, rows are scaled up from 2,000 records, and this is said.

[bold]Examples[/bold]
  vl01 status captions
  vl01 status s3://bucket/captions --endpoint-url http://localhost:9000

[bold]Exit codes[/bold]
  0  whether the run is going on, stopped or finished
  2  OUT is not the output of a run"""


def show_status(status: "Status") -> None:
    if status.planned_units is None:
        facts = {"output": status.output, "units": "the source is being listed"}
    else:
        share = status.committed_units / status.planned_units
        facts = {
            "output": status.output,
            "units": f"{status.committed_units:,} of {status.planned_units:,} are done "
            f"({share:.1%})",
            "again": f"{count(status.outdated_units, 'unit')} with files that changed since"
            if status.outdated_units
            else "",
            "rows": _rows(status),
            "reasons": _counts(status.reasons),
            "pace": _pace(status),
            "left": _left(status),
        }
    facts["run"] = _run(status)
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    for name, value in facts.items():
        if value:
            console.print(f"[bold]{name:<8}[/] {escape(value)}")


def _rows(status: "Status") -> str:
    if not status.rows:
        return "0"
    if status.exact:
        return f"{status.rows:,}: {_counts(status.statuses)}"
    return (
        f"about {status.rows:,}: {_counts(status.statuses)} "
        f"(scaled up from {status.records:,} records)"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def _pace(status: "Status") -> str:
    if status.pace is None:
        return "not known: too few units done in the last minutes" if status.alive else ""
    end = "" if status.alive else f" until {_utc(status)}"
    rate, seconds = status.pace.rows_per_second, status.pace.seconds
    span = f"{seconds:,.1f} seconds" if seconds < 60 else f"{seconds / 60:,.1f} minutes"
    return f"{rate:,.2f} rows/s over {span}{end}"


def _utc(status: "Status") -> str:
    return f"{status.last_commit:%Y-%m-%d %H:%M:%S} UTC" if status.last_commit else ""


def _left(status: "Status") -> str:
    if not status.pending_units:
        return "nothing: finished"
    units = count(status.pending_units, "unit")
    if (seconds := status.seconds_left) is None:
        return units
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{units}, about {f'{hours} h {minutes} min' if hours else f'{minutes} min'}"


def _run(status: "Status") -> str:
    holder = status.holder
    if holder is None:
        return "none is going on"
    who = f"{holder.run}, process {holder.pid} on {holder.host}"
    if status.alive:
        return f"{who}, alive {holder.age:,.0f} s ago"
    return (
        f"{who}, seems dead: its last sign was {holder.age:,.0f} s ago. The command that started "
        "it goes on from there"
    )
