"""CPUs are kept for rendering wherever there are pages to render, and nowhere else; and a run says
what is odd where it begins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from model.nano.random_checkpoint import write_random_checkpoint
from pipeline import lease
from pipeline.estimate.estimate import foretold
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.model import model_revision, open_model
from pipeline.plan import Plan, plan_table
from pipeline.run import Flow, has_documents, plan_or_resume
from pipeline.sources import open_source
from schemas.ledger import Unit, UnitKind
from tests.documents import pdf, tiff
from tests.images import good_images, page
from tests.pipeline.fake_run import job_of
from tests.sources import write_folder, write_parquet, write_tar

IMAGES = [*good_images(4), ("a.tif", tiff([page(0, (300, 200))]))]
DOCUMENTS = [*good_images(2), ("a.pdf", pdf(["x"] * 2))]
PAGES = [("a.tif", tiff([page(0, (300, 200)), page(1, (40, 900))]))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), tile=56)


@pytest.mark.parametrize(
    ("content", "renders"), [(IMAGES, False), (DOCUMENTS, True), (PAGES, True)]
)
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_documents_inside_of_files_are_noticed(tmp_path, checkpoint, kind, content, renders):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write = {"tar": write_tar, "parquet": write_parquet}[kind]
    write(source / f"x.{kind}", content)
    job = job_of(source, output).model_copy(update={"model": str(checkpoint)})
    found, ledger = open_source(job.source), Ledger(job.output)
    ledger.prepare()
    ledger.create(job, job.fingerprint(model_revision(job)), Plan.of(job, found), "run")
    units = pa.concat_tables(ledger.pending())
    told = foretold(job, open_model(job), found, ledger, units)
    assert has_documents(units, told) is renders
    assert not has_documents(units, None)


def names_of(kind: UnitKind, *names: str) -> pa.Table:
    return plan_table([Unit(0, UnitKind.IMAGES, ("b.jpg",), 0, 1), Unit(1, kind, names)])


def test_names_tell_of_documents_where_nothing_is_looked_into(tmp_path):
    write_folder(tmp_path, [("a.PDF", pdf(["x"]))])
    files = Plan(open_source(str(tmp_path)), unit_rows=4).units()
    assert has_documents(plan_table(list(files)), None)
    lists, tar = UnitKind.LIST, UnitKind.TAR
    assert has_documents(names_of(lists, "urls.txt", "http://a/b.jpg", "http://a/b.pdf?x"), None)
    assert has_documents(names_of(tar, "x.tar", "a.jpg", "a.tiff"), None)
    assert not has_documents(names_of(lists, "urls.txt", "http://a/b.jpg"), None)
    assert not has_documents(names_of(tar, "x.tar", "a.jpg"), None)
    assert not has_documents(names_of(UnitKind.IMAGES, "a.jpg"), None)


def test_files_left_out_and_files_that_are_in_the_way_of_readers_are_told_once(
    tmp_path, checkpoint, monkeypatch
):
    """pandas and pyarrow fail on a dataset that shares its folder with other files."""
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
    write_folder(tmp_path / "in", good_images(2))
    (tmp_path / "in/a.heic").write_bytes(b"x")
    write_folder(tmp_path / "out", [(".hidden", b""), ("_logs.txt", b""), ("notes.txt", b"")])
    job = job_of(tmp_path / "in", tmp_path / "out").model_copy(update={"model": str(checkpoint)})
    told: list[str] = []
    for _ in range(2):
        ledger = Ledger(job.output)
        ledger.prepare()
        with Lease(ledger) as held:
            plan_or_resume(job, open_source(job.source), ledger, held, told.extend)
    assert len(told) == 2
    assert told[0] == "not read, for their names: 1 .heic"
    assert "holds other files too, such as notes.txt" in told[1]


def test_random_weights_are_not_taken_for_broken_when_rounding_changes_what_they_write(
    tmp_path, checkpoint
):
    hardware = SimpleNamespace(device="cuda", gpu="H200")
    place: Any = SimpleNamespace(
        device="cpu", threads=1, chunk_tokens=256, max_sequences=None, hosts=None,
        hardware=lambda: hardware,
    )  # fmt: skip
    read: Any = SimpleNamespace(kept=None)
    book: Any = None

    def canary(**keys: Any):
        job = job_of(tmp_path, tmp_path / "out").model_copy(update=keys)
        return Flow(job, open_model(job), read, place, book, 0).generate_settings().canary

    assert canary(model=str(checkpoint)) is not None
    assert canary(model=str(checkpoint), random_weights=True) is None
