"""`vl01 report`, and the report at the end of a run, which must never fail because of it."""

from pathlib import Path
from typing import Annotated

import typer

from jobs import show
from jobs.config import absolute_address
from jobs.flags import Debug, EndpointUrl
from schemas.job import Job

HELP = """Write a report on OUT: one page that shows what came out and how.

Numbers of the dataset and its runs, distributions, and a contact sheet:
pictures beside what was written, half of them at random and half by risk.
Needs no model and no network; the pictures are read from the source.
Every run ends with it too.

Written into OUT/_vl01: report.html, one file to open anywhere, and
report.json with the same numbers.

[bold]Examples[/bold]
  vl01 report captions
  vl01 report captions --gpu-hour-price 2.50

[bold]Exit codes[/bold]
  0  the report is written
  2  OUT is not the output of a run, or cannot be written"""

_WRITING = "reading rows and pictures, writing the report"
MOST_UNITS = 10_000  # with more, a run ends without: the commit records alone take a minute

Seed = Annotated[int, typer.Option(help="another seed shows other rows", min=0, metavar="INTEGER")]
Price = Annotated[
    float | None,
    typer.Option(help="price of a GPU for an hour: tells the cost", min=0.0, metavar="NUMBER"),
]


def report(
    output: Annotated[str, typer.Argument(help="the output of a run", metavar="OUT")],
    gpu_hour_price: Price = None,
    seed: Seed = 0,
    endpoint_url: EndpointUrl = None,
    _debug: Debug = False,
) -> None:
    from pipeline.report import write_report

    output = absolute_address(output, Path.cwd())
    with show.busy(_WRITING):
        written = write_report(output, endpoint_url, gpu_hour_price, seed)
    show.report(written)


def report_after_run(job: Job, units: int) -> None:
    """An error is one line; the run's own exit code stands."""
    if units > MOST_UNITS:
        show.error(f"no report yet: {units:,} units take a while; vl01 report {job.output} does it")
        return
    try:
        from pipeline.report import write_report

        with show.busy(_WRITING):
            written = write_report(job.output, job.endpoint_url)
        show.report(written)
    except Exception as error:  # whatever it is, the rows are committed
        show.error(f"the report was not written: {' '.join(str(error).split())}")
