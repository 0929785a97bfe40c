import io
import tarfile

import pyarrow as pa
import pytest
from rich.console import Console

from pipeline.commit import Committer
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.tally import Tally
from schemas.errors import EngineError
from schemas.report import Foretold
from schemas.rows import GENERATED
from tests.pipeline.fake_run import job_of, run, write_images


@pytest.fixture
def tally() -> Tally:
    return Tally(Progress(Console(file=io.StringIO())))


@pytest.fixture
def ledger(tmp_path):
    """Of a finished run over six images and a tar without any: 6 rows ok, 1 failed."""
    write_images(tmp_path / "source", 6)
    tarfile.open(tmp_path / "source" / "none.tar", "w").close()
    return run(job_of(tmp_path / "source", tmp_path / "out"))


def test_ray_does_not_seem_to_start_again_once_the_model_is_loaded():
    progress = Progress(Console(file=io.StringIO()))
    progress.start(1, "starting Ray, loading the model")
    tally = Tally(progress)
    tally.waits(None)
    assert "starting Ray" in str(progress.line())
    tally.waits("starting: rank 0 of 1 loading its layers, 71%")
    tally.waits(None)
    assert str(progress.line()).endswith("waiting for the first answers (1 unit to do)")


def test_a_strict_job_counts_the_failures_of_earlier_runs_too(tally, ledger):
    with Lease(ledger) as lease:
        summary = tally.summary(ledger, Committer(ledger, lease), strict=True)
    assert summary.failed_in_all == 1
    assert summary.rows == {}


def test_units_that_went_missing_on_the_way_stop_the_run(tally, ledger):
    ledger.remove("commits/000000000.json")
    ledger = Ledger(ledger.output)  # a ledger lists its records once
    ledger.resume()
    with (
        Lease(ledger) as lease,
        pytest.raises(EngineError, match="1 of 3 units are not done"),
    ):
        tally.summary(ledger, Committer(ledger, lease), strict=False)


def test_rows_tokens_and_seconds_add_up(tally, ledger):
    row = {"finish_reason": "stop", "prompt_tokens": 90, "output_tokens": 10}
    seconds = {"read_seconds": 0.5, "prepare_seconds": 1.0, "generate_seconds": 2.0}
    bad = {"reason": "decode_error", "read_seconds": 0.5}
    bad |= {"replica_seconds": 2.0, "rank_seconds": [1.0, 1.75]}
    seconds |= {"replica_seconds": 1.0, "rank_seconds": [0.75, 1.0]}
    tally.foretold = Foretold(3, 1, 9, 90, True, rank_busy=(1.0, 0.9))
    first, copy = row | seconds | {"copied": False}, row | seconds | {"copied": True}
    tally.generated(pa.Table.from_pylist([first, copy, bad], schema=GENERATED))
    tally.replicas(["a replica was started again: why"], restarts=1)
    with tally.committing():
        tally.committed([ledger.record(0), ledger.record(1)], begun=0)
    with Lease(ledger) as lease:
        summary = tally.summary(ledger, Committer(ledger, lease), strict=False)
    assert summary.restarts == 1
    assert (summary.copied, summary.copied_tokens) == (1, 100)
    assert summary.rows == {"ok": 4, "failed": 1}
    assert summary.reasons == {"empty_source": 1}
    assert (summary.prompt_tokens, summary.output_tokens) == (40, 8)
    assert summary.stage_seconds.pop("commit") >= 0
    assert summary.stage_seconds == {"read": 1.5, "prepare": 2.0, "generate": 4.0}
    assert summary.loaded_seconds == 4.0
    assert summary.rank_busy == (2.5 / 4, 3.75 / 4)
    assert summary.rank_busy_at_most == (1.0, 0.9)


def test_tokens_that_were_copied_make_no_run_look_faster(tally, ledger):
    rows = [
        {"finish_reason": "stop", "prompt_tokens": 90, "output_tokens": 10, "copied": copied}
        for copied in (False, True, True)
    ]
    with tally.recorded(ledger, "run"):
        tally.generated(pa.Table.from_pylist(rows, schema=GENERATED))
    assert tally._progress.tokens == 100
    assert ledger.run("run").copied_tokens == 200
