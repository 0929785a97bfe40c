"""`vl01 retry`: some rows of an output again; which ones and how is `pipeline`'s."""

from pathlib import Path
from typing import Annotated

import typer

from jobs import show
from jobs.config import absolute_address, job_of_retry
from jobs.flags import Debug, EndpointUrl
from jobs.report import report_after_run
from jobs.resumable import resumable
from schemas.errors import ConfigError, Reason
from schemas.rows import Status

HELP = """Do some rows of OUT again, and put what comes out in their place.

For failures that have passed: a file that was mended, storage that was out
of reach, a time limit that was too short. Only these rows are read and
computed; the other rows stay as they are. A row that was answered is never
replaced by a failure; the column attempts counts all tries.

The job is the one that wrote OUT. Where and how fast it runs may be given
anew. So may --max-new-tokens, --temperature, --top-p and --seed, for an
answer that was cut or broken: asked the same, it answers the same. Rows that
were answered so say it in the column message. Stopped, the same command goes
on.

[bold]Examples[/bold]
  vl01 retry captions
  vl01 retry captions --reason timeout --decode-seconds 120
  vl01 retry captions --status truncated --max-new-tokens 1024 --pp 4
  vl01 retry fields --status invalid --temperature 0.4

[bold]Exit codes[/bold]
  0  done, also if rows failed once more
  1  stopped before the end; the same command goes on
  2  wrong usage or configuration, found before any model was loaded"""


def retry(
    *,
    output: Annotated[str, typer.Argument(help="the output of a run", metavar="OUT")],
    status: Annotated[
        list[Status], typer.Option(help="rows to do again; may be repeated", metavar="STATUS")
    ] = [Status.FAILED],  # noqa: B006 (typer copies it)
    reason: Annotated[
        list[Reason], typer.Option(help="only rows with this; may be repeated", metavar="REASON")
    ] = [],  # noqa: B006
    endpoint_url: EndpointUrl = None,
    _debug: Debug = False,
    **changes: str | None,
) -> None:
    if Status.OK in status:
        raise ConfigError("--status is ok; rows that are ok are not done again")
    from pipeline.early import check, stored_job

    output = absolute_address(output, Path.cwd())
    job, changed = job_of_retry(
        stored_job(output, endpoint_url), output, changes | {"endpoint_url": endpoint_url}
    )
    check(job)
    if not changed and {Status.TRUNCATED, Status.INVALID} & {*status}:
        show.asked_the_same(job)
    with resumable():
        with show.busy("starting"):
            from pipeline.retry import Choice, retry

        summary = retry(job, Choice(frozenset(status), frozenset(reason)), changed)
    show.retry(summary)
    if summary.units:
        report_after_run(job, summary.planned_units)
