"""What a command says at its end: results on standard output, what went wrong on standard error."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pipeline.progress import count, is_live
from schemas.job import Job
from schemas.ledger import Growth
from schemas.report import Summary

if TYPE_CHECKING:
    from pipeline.replacer import RetrySummary
    from pipeline.report import Written
    from pipeline.verify import Verification


def error(message: str, advice: str = "") -> None:
    console = Console(stderr=True, soft_wrap=True, emoji=False)
    for line in message.splitlines():
        console.print(f"[bold red]vl01:[/] {escape(line)}", highlight=False)
    if advice:
        console.print(escape(advice), style="dim", highlight=False)


def busy(what: str) -> AbstractContextManager[object]:
    """A sign of life in a terminal, for what takes seconds: imports of libraries, a plan."""
    console = Console(stderr=True)
    return console.status(what) if is_live(console) else nullcontext()


def passed_on(text: str) -> None:
    """What a run elsewhere says, as it comes."""
    print(text, end="", flush=True)


def summary(result: Summary) -> None:
    """Rows by status, tokens, time in each stage, where the output is."""
    facts = {"output": f"{result.output} ({count(result.units, 'unit')}, all committed)"}
    if result.growth:
        facts["source"] = growth(result.growth)
    if result.random_weights:
        facts["weights"] = "random, for measuring only: the texts mean nothing"
    if result.rows:
        facts |= {
            "rows": _counts(result.rows),
            "reasons": _counts(result.reasons),
            "copied": f"{result.copied:,} from identical images" if result.copied else "",
            "tokens": _tokens(result),
            "time": _time(result),
            "stages": _stages(result),
            "ranks": _ranks(result),
            "replicas": f"started again {count(result.restarts, 'time')}" * bool(result.restarts),
        }
    else:
        facts["rows"] = "nothing was left to do"
    _facts(facts)


def growth(found: Growth) -> str:
    """What is new in a source that was listed again."""
    counts = {
        "new": found.new_files,
        "changed": found.changed_files,
        "gone (their rows stay)": found.gone_files,
        "written too recently (--settle-seconds), left for the next run": found.waiting_files,
    }
    told = [f"{count(number, 'file')} {what}" for what, number in counts.items() if number]
    return "; ".join(told) or "nothing is new or changed"


def retry(result: "RetrySummary") -> None:
    """How many of the rows that were done again are ok now, and why the others are not."""
    rows = sum(result.rows.values())
    left = (
        f"{count(result.unfinished_units, 'unit')} of {result.planned_units:,}, which the run's own"
        " command does"
        if result.unfinished_units
        else ""
    )
    if not rows:
        _facts({"output": result.output, "rows": "none is to be done again", "left": left})
        return
    now = f"{result.rows.get('ok', 0):,} of {rows:,} are ok"
    added = f", {result.added:,} of them new" if result.added else ""
    _facts(
        {
            "output": result.output,
            "again": f"{count(result.again, 'row')} in {count(result.units, 'unit')}, "
            f"{result.seconds:,.1f} s",
            "now": f"{now}{added}: {_counts(result.rows)}",
            "reasons": _counts(result.reasons),
            "left": left,
        }
    )


def asked_the_same(job: Job) -> None:
    """That rows with an answer will be answered as before."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(
        "Rows that have an answer are asked the same again, and answer the same unless their"
        f" images changed. --max-new-tokens (was {job.max_new_tokens}), --temperature"
        f" ({job.temperature:g}), --top-p ({job.top_p:g}) or --seed ({job.seed}) asks otherwise."
    )


def report(written: "Written") -> None:
    """Where the page is, and what it could not tell."""
    _facts({"report": written.html})
    for problem in written.report.problems:
        error(problem)


def quantized(facts: dict[str, str]) -> None:
    """What `vl01 quantize` read and wrote."""
    _facts(facts)


def _facts(facts: dict[str, str]) -> None:
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    for name, value in facts.items():
        if value:
            console.print(f"[bold]{name:<8}[/] {escape(value)}")


def _counts(counts: dict[str, int]) -> str:
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {name}" for name, count in by_count if count)


def _time(result: Summary) -> str:
    rows = sum(result.rows.values())
    told = _rate(rows, result.seconds)
    if result.loaded_seconds:
        told += f"; with the model loaded, {_rate(rows, result.loaded_seconds)}"
    return told


def _rate(rows: int, seconds: float) -> str:
    return f"{seconds:,.1f} s" + (f", {rows / seconds:,.2f} rows/s" if seconds else "")


def _tokens(result: Summary) -> str:
    copied = f", {result.copied_tokens:,} of both copied" if result.copied_tokens else ""
    return f"{result.prompt_tokens:,} read, {result.output_tokens:,} written{copied}"


def _stages(result: Summary) -> str:
    busy = ", ".join(f"{stage} {seconds:,.1f} s" for stage, seconds in result.stage_seconds.items())
    return f"{busy} (busy time, summed over workers)" if busy else ""


def _ranks(result: Summary) -> str:
    if len(result.rank_busy) < 2:
        return ""
    at_most = _shares(result.rank_busy_at_most)
    foretold = f"; foretold at most {at_most}" if at_most else ""
    return f"busy {_shares(result.rank_busy)} of the time since the model was loaded{foretold}"


def _shares(shares: Iterable[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)


def verification(found: "Verification") -> None:
    """The verdict, with the units and rows behind it, and each problem in a line of its own."""
    verdict = "every row is there, once" if found.ok else "not every row is there once"
    _facts(
        {
            "output": found.output,
            "units": f"{found.committed_units:,} of {found.planned_units:,} are committed",
            "rows": f"{found.rows:,}: {_counts(found.statuses)}" if found.rows else "0",
            "reasons": _counts(found.reasons),
            "missing": count(found.missing_rows, "row") if found.missing_rows else "",
            "doubled": count(found.doubled_rows, "row") if found.doubled_rows else "",
            "verdict": verdict,
        }
    )
    for problem in found.problems:
        error(problem)
    if found.damaged_units:
        error(
            "a damaged unit is done again, once its record"
            f" {found.output}/_vl01/commits/NUMBER.json is deleted, by the command that started it"
        )
    if found.outdated_units:
        error(
            f"{found.outdated_units:,} units have files that changed since and are to be done "
            "again; the command that started it does it"
        )
    if found.pending_units:
        error(
            f"the run is not finished, {count(found.pending_units, 'unit')} to do: "
            "the command that started it goes on"
        )
