"""A run over lists foretells what it can without fetching an address, and says what it cannot."""

import pyarrow as pa
import pytest

from model.nano.random_checkpoint import write_random_checkpoint
from pipeline.ledger import Ledger
from pipeline.model import model_revision, open_model
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.report.html import foretold_from
from pipeline.run import _foretold
from pipeline.sources import open_source
from schemas.job import Job
from schemas.report import Foretold, Hardware, RunKind, RunRecord
from tests.pipeline.fake_run import job_of

ROWS = 10


@pytest.fixture
def job(tmp_path) -> Job:
    # Nobody listens there: whoever fetched them would find only failures.
    addresses = [f"http://127.0.0.1:9/{i}.jpg" for i in range(ROWS)]
    (tmp_path / "urls.txt").write_text("\n".join(addresses))
    model = write_random_checkpoint(tmp_path / "checkpoint", tile=56)
    changes = {"model": str(model), "device": "cpu", "allow_host": ("127.0.0.1",)}
    return job_of(tmp_path / "urls.txt", tmp_path / "out").model_copy(update=changes)


def planned(job: Job) -> Ledger:
    ledger = Ledger(job.output)
    ledger.prepare()
    plan = Plan.of(job, open_source(job.source))
    ledger.create(job, job.fingerprint(model_revision(job)), plan, "run")
    return ledger


def told(job: Job, ledger: Ledger) -> Foretold:
    pending, source = pa.concat_tables(ledger.pending()), open_source(job.source)
    found = _foretold(job, open_model(job), source, ledger, pending, Progress())
    assert found
    return found


def a_run(rows: dict[str, int], what: RunKind = "run") -> RunRecord:
    many = sum(rows.values())
    return RunRecord(
        run=f"20260101T{many:06}Z-{what}",
        started_at="",
        finished_at="",
        seconds=110.0,
        start_seconds=10.0,
        rows=rows,
        prompt_tokens=30 * many,
        output_tokens=10 * rows["ok"],
        stage_seconds={},
        hardware=Hardware("cpu", 1, 1, 1),
        what=what,
        tiles=3 * many,
    )


def test_a_first_run_knows_its_rows_and_says_why_no_more(job):
    found = told(job, planned(job))
    assert (found.rows, found.seconds, found.knows_rows) == (ROWS, None, False)
    assert foretold_from(found).endswith("no earlier run tells of any")


def test_a_later_run_takes_addresses_to_lead_to_what_they_led_to_before(job):
    ledger = planned(job)
    ledger.write_run(a_run({"ok": 1, "failed": 0}))
    ledger.write_run(a_run({"ok": 32, "failed": 8}))
    ledger.write_run(a_run({"ok": 100, "failed": 0}, what="retry"))
    found = told(job, ledger)
    assert found.knows_rows
    assert (found.rows, found.failed, found.tiles, found.prompt_tokens) == (ROWS, 2, 30, 300)
    # A retry is of chosen rows, but as fast as any run: 4,000 tokens in 100 s, after 10 to start.
    assert found.seconds == pytest.approx(10 + (300 + 8 * 10) / 40)
    assert found.speed
    assert not found.exact
    assert "addresses are fetched but once" in foretold_from(found)
