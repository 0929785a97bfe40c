"""A run without Ray and without a model: what run.py does around reading and committing."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.commit import Committer
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.read import ReadSettings, read_settings, read_units
from pipeline.render.settings import PageSettings
from pipeline.sources import open_source
from schemas.errors import RowError
from schemas.extraction import Extraction
from schemas.job import Job
from schemas.ledger import PLAN
from schemas.rows import INPUT, generated_schema


def job_of(source: object, output: object, **keys: Any) -> Job:
    return Job(
        source=str(source), output=str(output), model="/nano", prompt="?", unit_rows=4, **keys
    )


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:04}.jpg").write_bytes(b"image %d" % i)


def generated(rows: pa.Table, asked: Extraction | None = None) -> pa.Table:
    """The answer to every good row is the image's bytes, so that a row shows where it is from."""
    table = rows.to_pylist()
    for row in table:
        text = row.pop("data")
        if row["reason"] is None:
            row["text"], row["finish_reason"] = text.decode(errors="replace"), "stop"
            row["prompt_tokens"], row["output_tokens"] = 10, 2
            row |= _extracted(asked, row["text"]) if asked else {}
    kept = pa.schema(list(rows.schema)[len(INPUT) :])
    return pa.Table.from_pylist(table, generated_schema(asked, kept))


def _extracted(asked: Extraction, text: str) -> dict[str, Any]:
    """A token for each character, each of the probability one half."""
    try:
        data = asked.parse(text)
    except RowError as error:
        return {"reason": error.reason, "message": error.message}
    ends = list(range(1, len(text) + 1))
    return {"data": data, "confidence": asked.confidence(text, [-math.log(2)] * len(text), ends)}


def stream(
    ledger: Ledger, settings: ReadSettings, asked: Extraction | None = None
) -> Iterator[pa.Table]:
    for units in ledger.pending():
        for rows in read_units(units, settings):
            yield generated(rows, asked)


def run(
    job: Job, order: Callable[[list[pa.Table]], list[pa.Table]] = lambda tables: tables
) -> Ledger:
    """Does what is left of a job. `order`: in which order tables reach the committer."""
    fingerprint = job.fingerprint("revision")
    source = open_source(job.source, job.endpoint_url)
    ledger = Ledger(job.output, job.endpoint_url)
    ledger.prepare()
    with Lease(ledger) as lease:
        planned = ledger.resume(fingerprint)
        if not planned:
            ledger.create(job, fingerprint, Plan.of(job, source), lease.run)
        ledger.clean_up()
        if planned and job.grow:
            ledger.grow(job, source)
        committer = Committer(ledger, lease)
        committer.add_empty(pa.concat_tables([PLAN.empty_table(), *ledger.pending()]))
        settings = replace(read_settings(job, source, PageSettings()), kept=ledger.kept)
        for rows in order(list(stream(ledger, settings, job.extraction()))):
            committer.add(rows)
        assert committer.incomplete() == {}
    return ledger
