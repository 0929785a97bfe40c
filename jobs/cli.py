"""The `vl01` command: what to type, what is shown, which exit code. What is done is `pipeline`'s.

Imports nothing heavy before a run begins: help and usage errors come at once.
"""

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from jobs import plan, show, show_status, submit
from jobs.bench import cli as bench
from jobs.config import TASKS, absolute_address, job_from_file, job_from_flags
from jobs.flags import Debug, EndpointUrl, JobFile, with_changes, with_flags
from jobs.quantize import HELP as _QUANTIZE
from jobs.quantize import quantize
from jobs.report import HELP as _REPORT
from jobs.report import report, report_after_run
from jobs.resumable import resumable
from jobs.retry import HELP as _RETRY
from jobs.retry import retry
from jobs.task import Task
from schemas.errors import ExitCode, VL01Error
from schemas.job import Job

# Help is printed as it stands here: lines of at most 76 columns fit a terminal of 80.
_STATUSES = """[bold]Statuses of a row[/bold]
  ok          the model answered
  truncated   the answer was cut at --max-new-tokens, or went in circles
  invalid     the answer breaks the schema (vl01 extract)
  failed      there is no answer; the columns reason and message say why"""

_EXIT_CODES = """[bold]Exit codes[/bold]
  0  every row accounted for (failed rows are rows)
  1  the run stopped, and the same command resumes it; or another run is
     writing to OUT
  2  wrong usage or configuration, found before any model was loaded
  3  --strict was given and some rows failed
  4  vl01 verify: rows missing or twice"""

_ABOUT = f"""MiniMax-VL-01 over many images and pages: Parquet comes back.

One row comes out for every image or page that goes in, also for one that
cannot be read. A run that was stopped goes on where it was when the same
command is given again.

[bold]Examples[/bold]
  vl01 plan job.yaml
  vl01 caption photos --output captions --model /models/vl01 --pp 8
  vl01 ocr scans --output texts --model /models/vl01 --pp 8
  vl01 status captions
  vl01 verify captions
  vl01 retry captions --status failed

SOURCE is a folder or a glob of images, documents (.pdf, .tif), WebDataset
.tar files, or .parquet files with an image column; or a list of addresses
(.txt, .csv, .jsonl); on disk or at any fsspec address, such as
s3://bucket/folder. OUT becomes part-*.parquet and _vl01/; pyarrow, pandas,
DuckDB, Spark and `datasets` read it as it is.

{_EXIT_CODES}"""

_RUN = f"""Run the job in a YAML file: for scheduled runs.

[bold]Example[/bold] of a job.yaml, started with vl01 run job.yaml
  task: caption
  source: s3://bucket/photos
  output: captions/$DATE     # from the environment; ~ is the home folder
  model: ~/models/vl01
  pp: 8
  keep: \\[url, license]       # --keep url --keep license
  ladder:                    # what is tried again; each task has its own
    - {{when: \\[repetition], temperature: 0.4}}
    - {{when: \\[unsure, empty], unsure_below: -1.0, turn: 180}}
    - {{when: \\[max_new_tokens], more_tokens: 2}}

Every flag has its key, without dashes and with _ for - (--max-pixels is
max_pixels); vl01 caption --help lists them. Relative paths start at the
folder of the file, wherever the command is given. Flags and file make the
same job, so that each resumes what the other began.

{_STATUSES}

{_EXIT_CODES}"""

_VERIFY = """Check that OUT holds every planned row once, and nothing else.

Compares the plan, the commit records and the parts. Changes nothing and
needs no model.

[bold]Examples[/bold]
  vl01 verify captions
  vl01 verify s3://bucket/captions --endpoint-url http://localhost:9000

[bold]Exit codes[/bold]
  0  every row is there once
  1  the ledger itself cannot be read
  2  OUT is not the output of a run
  4  rows missing or twice, a part is damaged, or OUT holds other rows too"""

app = typer.Typer(
    name="vl01",
    help=_ABOUT,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected error is a bug: show it as Python does
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(plan.app, name="plan")
app.add_typer(bench.app, name="bench")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"vl01 {version('vl01-batch')}")
        raise typer.Exit


@app.callback()
def vl01(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="show the version", callback=_show_version, metavar="", is_eager=True
        ),
    ] = False,
) -> None:
    """Only carries the options of `vl01` itself."""


def _task_command(task: Task) -> Callable[..., None]:
    def command(*, _debug: Debug = False, **values: Any) -> None:
        _run(job_from_flags(task, values))

    return with_flags(task, command)


def _task_help(task: Task) -> str:
    examples = "\n".join(f"  vl01 {task.name} {escape(example)}" for example in task.examples)
    parts = task.summary, f"[bold]Examples[/bold]\n{examples}", task.notes, _STATUSES, _EXIT_CODES
    return "\n\n".join(filter(None, parts))


for _task in TASKS.values():
    app.command(_task.name, help=_task_help(_task))(_task_command(_task))


@app.command("run", help=_RUN)
def run_file(job: JobFile, _debug: Debug = False) -> None:
    _run(job_from_file(job))


@app.command("submit", help=submit.HELP)
def submit_file(
    job: JobFile,
    address: Annotated[str, typer.Option(help="the cluster's job server", metavar="ADDR")],
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="follow the run to its end", metavar="")
    ] = True,
    _debug: Debug = False,
) -> None:
    raise typer.Exit(submit.submit(job_from_file(job), address, wait, show.passed_on))


app.command("retry", help=_RETRY)(with_changes(retry))


@app.command(help=show_status.HELP)
def status(
    output: Annotated[str, typer.Argument(help="the output of a run", metavar="OUT")],
    endpoint_url: EndpointUrl = None,
    _debug: Debug = False,
) -> None:
    from pipeline.status import status as look

    with show.busy("reading the ledger"):
        found = look(absolute_address(output, Path.cwd()), endpoint_url)
    show_status.show_status(found)


@app.command(help=_VERIFY)
def verify(
    output: Annotated[str, typer.Argument(help="the output of a run", metavar="OUT")],
    deep: Annotated[bool, typer.Option("--deep", help="read every part too", metavar="")] = False,
    endpoint_url: EndpointUrl = None,
    _debug: Debug = False,
) -> None:
    from pipeline.verify import verify as check

    with show.busy("comparing the plan, the records and the parts"):
        verification = check(absolute_address(output, Path.cwd()), endpoint_url, deep)
    show.verification(verification)
    raise typer.Exit(ExitCode.OK if verification.ok else ExitCode.UNACCOUNTED)


app.command("report", help=_REPORT)(report)
app.command("quantize", help=_QUANTIZE)(quantize)


def _run(job: Job) -> NoReturn:
    with resumable():
        from pipeline.early import check

        check(job)
        with show.busy("starting"):
            from pipeline.run import run

        summary = run(job)
    show.summary(summary)
    if summary.rows:  # else a scheduled run that found nothing new would take as long as its report
        report_after_run(job, summary.units)
    if failed := summary.failed_in_all:
        told = "1 row of OUT has" if failed == 1 else f"{failed:,} rows of OUT have"
        show.error(f"--strict: {told} failed; vl01 retry {job.output} does such rows again")
        raise typer.Exit(ExitCode.STRICT)
    raise typer.Exit


def main(arguments: list[str] | None = None) -> NoReturn:
    """Every way out of `vl01`: one clear line and an exit code, no traceback unless asked for."""
    try:
        code = app(arguments, prog_name="vl01", standalone_mode=False)
    except typer.TyperException as wrong_usage:
        if wrong_usage.format_message():
            show.error(_said(wrong_usage), "vl01 --help and vl01 COMMAND --help explain.")
        code = ExitCode.USAGE
    except VL01Error as refusal:
        if os.environ.get("VL01_DEBUG") == "1":
            raise
        show.error(str(refusal))
        code = refusal.exit_code
    except OSError as error:  # of the machine: no room for what is shown, no working folder
        if os.environ.get("VL01_DEBUG") == "1":
            raise
        show.error(f"{error} (--debug shows where)")
        code = ExitCode.STOPPED
    sys.exit(code)


def _said(wrong_usage: typer.TyperException) -> str:
    """With what is to be given, where something is missing or there is too much."""
    message = wrong_usage.format_message().replace("Value error, ", "")
    if "unexpected extra argument" in message:  # it may hold the names of all files of a folder
        return (
            f"{message if len(message) < 160 else message[:160] + '...)'}. Put a glob in quotes, "
            "'photos/*.jpg': the shell would make many arguments of it. A flag takes one value; "
            "for several it is repeated"
        )
    parameter = getattr(wrong_usage, "param", None)
    wanted = getattr(parameter, "help", None) if message.startswith("Missing") else None
    return f"{message.rstrip('.')}: {wanted}" if wanted else message
