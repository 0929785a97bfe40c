"""`vl01 plan`: the same arguments as a run, or its job file; what is foretold is `pipeline`'s."""

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jobs import show, show_plan
from jobs.config import TASKS, job_from_file, job_from_flags
from jobs.flags import Debug, JobFile, with_flags, with_parameters
from jobs.task import Task
from schemas.estimate import Assumptions
from schemas.job import Job


class _FileByDefault(TyperGroup):
    """`vl01 plan job.yaml` is `vl01 plan run job.yaml`, as nothing else can be meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            misspelt = difflib.get_close_matches(args[0], self.commands)
            if not misspelt or Path(args[0]).exists():
                args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_FileByDefault,
    help=show_plan.HELP,
    rich_markup_mode="rich",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def plan() -> None:
    """Only gathers its commands."""


def _command(job_of: Callable[[dict[str, Any]], Job]) -> Callable[..., None]:
    """A command with the options of a plan; `job_of` makes the job of its other ones."""

    def command(
        *,
        gpu_memory_gib: Annotated[
            float, typer.Option(help="what a GPU has", metavar="NUMBER", min=0)
        ] = Assumptions.gpu_memory_gib,
        gpu_hour_price: Annotated[
            float | None, typer.Option(help="of one GPU, for the price", metavar="NUMBER", min=0)
        ] = None,
        tokens_per_second: Annotated[
            float | None,
            typer.Option(help="read and written, by all replicas", metavar="NUMBER", min=1e-9),
        ] = None,
        bench: Annotated[
            str | None,
            typer.Option(
                help="what tells the speed: the JSON of vl01 bench slice, or a report.json",
                metavar="FILE",
            ),
        ] = None,
        json: Annotated[
            str | None, typer.Option(help="write it as JSON; - is standard output", metavar="FILE")
        ] = None,
        _debug: Debug = False,
        **values: Any,
    ) -> None:
        from pipeline.early import check

        job = job_of(values)
        check(job)
        with show.busy("listing the source, reading headers"):
            from pipeline.estimate.estimate import estimate

            assumed = Assumptions(gpu_memory_gib, gpu_hour_price, tokens_per_second, bench)
            found = estimate(job, assumed)
        if json:
            show_plan.write_json(found, json)
        if json != "-":
            show_plan.show_plan(found)

    return command


_FILE = inspect.Parameter("job", inspect.Parameter.KEYWORD_ONLY, annotation=JobFile)
app.command("run", help="Of the job in a YAML file: vl01 plan JOB.yaml is enough.")(
    with_parameters(_command(lambda values: job_from_file(values["job"])), [_FILE])
)


def _add_task(task: Task) -> None:
    command = with_flags(task, _command(lambda values: job_from_flags(task, values)))
    app.command(task.name, help=f"Of vl01 {task.name} with the same arguments.")(command)


for _task in TASKS.values():
    _add_task(_task)
