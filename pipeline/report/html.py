"""One self-contained page: the report's numbers, charts and contact sheet. Escapes every text."""

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from pipeline.progress import clock
from pipeline.report.charts import NARROW, WIDE, histogram, short_number, throughput
from pipeline.report.contact_sheet import Cell
from pipeline.report.sample import RANDOM
from schemas.report import Cost, Foretold, Report, RunFigures
from schemas.rows import Status

# Names on the page, and what their numbers are rounded to.
_DISTRIBUTIONS = {
    "prompt_tokens": ("Prompt tokens", 0),
    "output_tokens": ("Output tokens", 0),
    "text_length": ("Text length, characters", 0),
    "tiles": ("Tiles", 0),
    "mean_logprob": ("Confidence, mean log-probability", 2),
}
_MOST_TEXT = 4000  # characters shown of a row's text


def page(report: Report, job: dict[str, Any], cells: list[Cell]) -> str:
    """The HTML of a report. job: its keys and values, as job.json holds them."""
    drawn = {
        name: (title, digits, report.distributions[name], histogram(name, values))
        for name, (title, digits) in _DISTRIBUTIONS.items()
        if (values := report.distributions[name]).count
    }
    planned = next((run for run in reversed(report.runs) if run.foretold), None)
    return _template().render(
        report=report,
        planned=planned,
        compared=compared(planned, report.cost) if planned else [],
        job={key: in_job_file(value) for key, value in job.items() if value not in (None, [])},
        statuses=[(s.value, n) for s in Status if (n := report.statuses.get(s, 0))],
        reasons=sorted(report.reasons.items(), key=lambda item: (-item[1], item[0])),
        wide=throughput(report.throughput, WIDE),
        narrow=throughput(report.throughput, NARROW),
        drawn=drawn,
        by_chance=[cell for cell in cells if cell.why == RANDOM],
        by_risk=[cell for cell in cells if cell.why != RANDOM],
        most_text=_MOST_TEXT,
    )


def in_job_file(value: Any) -> str:
    """How a job file says it: YAML reads JSON, and Python's None and True as words."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def compared(run: RunFigures, cost: Cost | None) -> list[tuple[str, str, str]]:
    """(what, as it was foretold, as it was) of a run."""
    told = run.foretold
    assert told
    of_rows = [
        ("Failed", told.failed, run.failed),
        ("Tiles", told.tiles, run.tiles),
        ("Prompt tokens", told.prompt_tokens, run.prompt_tokens),
    ]
    lines = [
        ("Rows", f"{told.rows:,}", f"{run.rows:,}"),
        *(
            (name, f"{number:,}" if told.knows_rows else "\u2013", f"{measured:,}")
            for name, number, measured in of_rows
        ),
        ("Time", "\u2013" if told.seconds is None else clock(told.seconds), clock(run.seconds)),
    ]
    if len(run.rank_busy) > 1:
        at_most = told.rank_busy or (None,) * len(run.rank_busy)
        for rank, (most, busy) in enumerate(zip(at_most, run.rank_busy, strict=False)):
            foretold = "\u2013" if most is None else f"at most {most:.0%}"
            lines.append((f"Rank {rank} busy", foretold, f"{busy:.0%}"))
    if run.hardware and run.hardware.gpus:
        measured = run.seconds * run.hardware.gpus / 3600
        hours = told.gpu_hours
        lines.append(("GPU hours", _hours(hours), _hours(measured)))
        if cost:
            price = cost.gpu_hour_price
            priced = None if hours is None else hours * price
            lines.append(("Cost", _hours(priced), _hours(measured * price)))
    return lines


def foretold_from(told: Foretold) -> str:
    if told.exact:
        return "from the headers of all images"
    if told.looked:
        return "from the headers of a sample"
    if told.knows_rows:
        return "from the rows of an earlier run: addresses are fetched but once"
    return "which is little: addresses are fetched but once, and no earlier run tells of any"


def _hours(number: float | None) -> str:
    return "\u2013" if number is None else f"{number:,.2f}"


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(
            lambda name: files("pipeline.report").joinpath(name).read_text("utf-8")
        ),
    )
    environment.filters |= {
        "count": lambda number: f"{number:,}",
        "short": short_number,
        "rounded": _rounded,
        "clock": clock,
        "share": _share,
        "moment": lambda iso: iso[:16].replace("T", " ") + " UTC",
        "fields": _fields,
        "foretold_from": foretold_from,
    }
    return environment.get_template("page.html.jinja")


def _file(name: str) -> str:
    return files("pipeline.report").joinpath(name).read_text("utf-8")


def _rounded(number: float, digits: int = 0) -> str:
    return f"{number:,.{digits}f}".replace("-", "\u2212")


def _share(part: float, whole: float) -> str:
    """A percentage that is 0% or 100% only if it is exactly so."""
    if not whole:
        return "0%"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1%"
    if 99.9 < percent < 100:
        return "> 99.9%"
    return f"{percent:.1f}%"


def _fields(data: Any, confidence: Any) -> list[tuple[str, str, float | None]]:
    """The fields of an extraction, however nested, as lines of name, value and confidence."""
    sure = dict(_leaves(confidence))
    return [(name, _shown(value), sure.get(name)) for name, value in _leaves(data)]


def _leaves(data: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each value that has no others in it, with its place: seller.name, lines[0].price."""
    if isinstance(data, dict):
        below = ((f"{name}.{key}" if name else key, value) for key, value in data.items())
    elif isinstance(data, list):
        below = ((f"{name}[{i}]", value) for i, value in enumerate(data))
    else:
        yield name, data
        return
    for place, value in below:
        yield from _leaves(value, place)


def _shown(value: Any) -> str:
    """None as a dash; dates and decimals as they are printed."""
    if value is None:
        return "\u2013"
    return json.dumps(value) if isinstance(value, bool) else str(value)
