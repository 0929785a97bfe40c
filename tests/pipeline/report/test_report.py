"""The report says what the dataset says, shows hostile texts as texts, and needs no network."""

import base64
import dataclasses
import io
import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import lease
from pipeline.commit import Committer
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.read import ReadSettings, read_units
from pipeline.render.settings import PageSettings
from pipeline.report import Written, write_report
from pipeline.sources import open_source
from schemas.errors import ConfigError
from schemas.job import Job
from schemas.report import Hardware, RunRecord
from schemas.rows import GENERATED
from tests.documents import encrypted_pdf, pdf
from tests.images import damaged_exif
from tests.pipeline.fake_run import job_of
from tests.sources import write_folder, write_source

HOSTILE = '<script>alert("x")</script><img src=http://example.org/a.png onerror=alert(1)>'
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)


def picture(i: int) -> bytes:
    """One colour each, of six."""
    buffer = io.BytesIO()
    Image.new("RGB", (60 + i, 40), COLOURS[i % 6]).save(buffer, "PNG")
    return buffer.getvalue()


def answered(rows: pa.Table, text: str) -> pa.Table:
    """Good rows are answered in one of two ways; the data of a bad image is text."""
    table = rows.to_pylist()
    for number, row in enumerate(table):
        if row["reason"] is None and not row["data"].startswith(b"\x89PNG"):
            row["reason"], row["message"] = "not_an_image", f"it says {text}"
        if row["reason"] is None:
            row["text"] = text + "!" * number
            row["finish_reason"] = "length" if number % 3 == 0 else "stop"
            row["prompt_tokens"], row["output_tokens"] = 600 + number, 7 + number
            row["tiles"], row["mean_logprob"], row["attempts"] = 2 + number % 3, -0.1 * number, 1
    return pa.Table.from_pylist(table, GENERATED)


def dataset(folder: Path, text: str = "a picture", recorded: bool = True) -> Ledger:
    """The dataset of a finished run over folder/in."""
    return finished(job_of(folder / "in", folder / "out"), text, recorded)


def finished(job: Job, text: str = "a picture", recorded: bool = True) -> Ledger:
    source = open_source(job.source, job.endpoint_url)
    ledger = Ledger(job.output, job.endpoint_url)
    ledger.prepare()
    with Lease(ledger) as held:
        fingerprint = job.fingerprint("revision")
        ledger.create(job, fingerprint, Plan(source, job.unit_rows), held.run)
        committer = Committer(ledger, held)
        pages = PageSettings(((336, 336),), max_pages=job.max_pages)
        settings = ReadSettings(source, job.max_bytes, pages=pages)
        for units in ledger.pending():
            for rows in read_units(units, settings):
                committer.add(answered(rows, text))
        if recorded:
            ledger.write_run(record_of(held.run))
    return ledger


def record_of(run: str) -> RunRecord:
    return RunRecord(
        run=run,
        started_at="",
        finished_at="",
        seconds=1800.0,
        rows={},
        prompt_tokens=0,
        output_tokens=0,
        stage_seconds={"read": 1.0, "generate": 30.0},
        hardware=Hardware("cuda", ranks=4, replicas=2, prepare_workers=1),
        restarts=3,
    )


@pytest.fixture
def mixed(tmp_path) -> Path:
    """30 pictures in a folder, a tar and a Parquet file, two of them no pictures at all."""
    images = [(f"{i:02}.png", picture(i)) for i in range(30)]
    images[0] = ("00.png", b"text under the name of a picture")
    images[1] = ("01.png", b"text in a tar")
    write_source(tmp_path / "in", images)
    return tmp_path


def test_pages_of_documents_are_shown_and_why_others_are_not(tmp_path):
    documents = [
        ("a.pdf", pdf(["one", "two"])),
        ("b.pdf", encrypted_pdf()),
        ("c.pdf", pdf([""] * 4)),
    ]
    write_folder(tmp_path / "in", documents)
    job = job_of(tmp_path / "in", tmp_path / "out", max_pages=3)
    html = html_of(write_report(finished(job).output))
    assert html.count("data:image/jpeg") == 2
    assert "a.pdf · page 2" in html
    assert "Incorrect password" in html
    assert "more than 3 pages" in html


def test_a_document_that_was_mended_since_is_not_said_to_be_done_again(tmp_path):
    write_folder(tmp_path / "in", [("a.pdf", encrypted_pdf())])
    ledger = finished(job_of(tmp_path / "in", tmp_path / "out"))
    write_folder(tmp_path / "in", [("a.pdf", pdf(["one"]))])
    html = html_of(write_report(ledger.output))
    assert "No picture: the row that was asked for is not in it any more" in html


def html_of(written: Written) -> str:
    return Path(written.html).read_text("utf-8")


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_numbers_are_those_of_the_dataset(mixed):
    ledger = dataset(mixed)
    report = write_report(ledger.output).report
    frame = ds.dataset(ledger.output, format="parquet").to_table().to_pandas()
    told = json.loads(ledger.read("report.json"))
    assert told == json.loads(report.to_json())
    assert told["rows"] == len(frame) == 30
    assert told["statuses"] == frame.status.value_counts().to_dict()
    assert told["reasons"] == frame.reason.value_counts().to_dict()
    assert told["prompt_tokens"] == frame.prompt_tokens.sum()
    assert told["output_tokens"] == frame.output_tokens.sum()
    frame["text_length"] = frame.text.str.len()
    for name, values in told["distributions"].items():
        column = frame[name].dropna()
        assert values["count"] == len(column) == sum(values["counts"]) + values["above"]
        assert values["mean"] == pytest.approx(column.mean(), abs=1e-6)
        assert (values["least"], values["most"]) == pytest.approx((column.min(), column.max()))
        middle = np.quantile(column, 0.5, method="inverted_cdf")
        assert values["median"] == pytest.approx(middle, abs=1e-3)
    assert sum(told["throughput"]["rows"]) == pytest.approx(30, abs=0.1)


def test_cost_is_measured_on_the_gpus_of_the_run(mixed):
    ledger = dataset(mixed)
    cost = write_report(ledger.output, gpu_hour_price=3.0).report.cost
    assert cost is not None
    assert (cost.gpu_hours, cost.total) == (4.0, 12.0)  # half an hour of eight GPUs
    assert cost.per_million_rows == pytest.approx(12.0 / 30 * 1e6)
    assert write_report(ledger.output).report.cost is None


def test_replicas_that_ended_are_told_with_their_run(mixed):
    written = write_report(dataset(mixed).output)
    assert [run.restarts for run in written.report.runs] == [3]
    assert "started again: 3<" in html_of(written)


def test_pictures_are_found_again_in_folders_tars_and_parquet_files(mixed):
    page = html_of(write_report(dataset(mixed).output))
    cells = re.findall(r'<article class="cell">(.*?)</article>', page, re.DOTALL)
    assert len(cells) == 30
    shown = [cell for cell in cells if 'src="data:image/jpeg' in cell]
    assert len(shown) == 28
    for source in ("shard.tar", "table.parquet"):
        assert sum(source in cell for cell in shown) >= 9
    missing = [cell for cell in cells if cell not in shown]
    assert all("No picture: not an image" in cell for cell in missing)


def test_a_picture_stands_beside_its_own_row(mixed):
    from pipeline.report.collect import collect
    from pipeline.report.contact_sheet import contact_sheet

    ledger = dataset(mixed)
    for cell in contact_sheet(ledger, collect(ledger).picks, None):
        if cell.picture is None:
            continue
        row = cell.row
        number = int(row["member"][:2]) if "tar" in row["source"] else None
        if row["source"].endswith("png"):
            number = int(row["source"][-6:-4])
        if row["source"].endswith("parquet"):
            number = 2 + 3 * int(row["member"])
        assert number is not None
        assert cell.picture == _thumbnail(picture(number))


def _thumbnail(data: bytes) -> str:
    from pipeline.report.contact_sheet import thumbnail

    return thumbnail(data)


def test_a_photograph_with_a_damaged_tag_is_shown_upright(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(buffer, "PNG", exif=damaged_exif(6))
    write_folder(tmp_path / "in", [("0.png", buffer.getvalue())])
    job = job_of(tmp_path / "in", tmp_path / "out", exif_rotate=True)
    page = html_of(write_report(finished(job).output))
    (shown,) = re.findall(r"data:image/jpeg;base64,([\w+/=]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == (40, 60)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_grey_of_16_bits_is_shown_as_grey_as_it_is(mode):
    buffer = io.BytesIO()
    Image.new(mode, (60, 40), 40_000).save(buffer, "TIFF")
    shown = base64.b64decode(_thumbnail(buffer.getvalue()).partition(",")[2])
    assert Image.open(io.BytesIO(shown)).getpixel((30, 20)) == (156, 156, 156)


def test_hostile_texts_are_shown_as_texts(mixed):
    page = html_of(write_report(dataset(mixed, HOSTILE).output))
    elements = Elements(page).found
    assert "script" not in {tag for tag, _ in elements}
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(" in page


def test_nothing_on_the_page_is_fetched(mixed):
    page = html_of(write_report(dataset(mixed).output))
    for tag, attributes in Elements(page).found:
        assert tag not in {"link", "iframe", "object", "base"}
        for name in ("src", "href", "srcset", "action", "data"):
            if value := attributes.get(name):
                assert value.startswith(("data:image/jpeg;base64,", "#"))
    outside_pictures = re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", page)
    assert not re.search(r"https?:|url\(\s*[\"']?(?!#)|@import|[\"'(]//", outside_pictures)
    assert "default-src 'none'" in page


def test_a_dataset_without_rows_is_reported(tmp_path):
    write_source(tmp_path / "in", [("0.png", picture(0))])
    job = job_of(tmp_path / "in", tmp_path / "out")
    ledger = Ledger(job.output)
    ledger.prepare()
    ledger.create(job, job.fingerprint("revision"), Plan(open_source(job.source), 4), "run")
    written = write_report(ledger.output)
    assert (written.report.rows, written.report.rows_per_second) == (0, None)
    assert "Not finished: 0 of" in html_of(written)


def test_pages_are_not_set_against_the_rows_that_could_be_counted_before(tmp_path):
    write_folder(tmp_path / "in", [("0.png", picture(0)), ("a.pdf", pdf(["one", "two", "three"]))])
    ledger = finished(job_of(tmp_path / "in", tmp_path / "out"))
    image, document = range(ledger.totals.units)
    assert ledger.record(document).rows == 3
    ledger.remove(f"commits/{image:09}.json")
    page = html_of(write_report(ledger.output))
    assert "in 1 of 2 units" in page
    assert "planned" not in page


def test_a_dataset_of_failures_only_is_reported(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"no picture")
    written = write_report(dataset(tmp_path, recorded=False).output)
    assert written.report.statuses == {"failed": 3}
    assert written.report.distributions["tiles"].count == 0
    assert "not_an_image" in html_of(written)


def test_a_source_that_is_gone_costs_the_pictures_only(mixed):
    ledger = dataset(mixed)
    (mixed / "in").rename(mixed / "elsewhere")
    written = write_report(ledger.output)
    assert len(written.report.sampled) == 30
    assert "No picture: the source cannot be read" in html_of(written)


def test_damaged_parts_and_records_are_told_and_the_rest_is_reported(mixed):
    ledger = dataset(mixed)
    Path(ledger.part_path(0)).write_bytes(b"cut")
    ledger.write("runs/odd.json", b"{")
    written = write_report(ledger.output)
    assert [line.split(":")[0] for line in written.report.problems] == [
        "the record of run odd cannot be read",
        "unit 0",
    ]
    assert written.report.rows == 30
    assert 0 < written.report.distributions["tiles"].count < 28


def test_the_same_dataset_and_seed_give_the_same_sheet_and_another_seed_another(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(200):
        (tmp_path / "in" / f"{i:03}.jpg").write_bytes(picture(i) if i % 20 else b"no picture")
    ledger = dataset(tmp_path)
    once, again, other = (write_report(ledger.output, seed=seed).report for seed in (0, 0, 1))
    assert once.sampled == again.sampled
    assert once.sampled != other.sampled
    assert len({row.row_id for row in once.sampled}) == 48
    assert sum(row.why == "random" for row in once.sampled) == 24
    by_risk = {row.why for row in once.sampled} - {"random"}
    assert by_risk == {"failed", "truncated", "least confident", "short", "long"}


def test_fields_of_an_extraction_are_shown(mixed):
    ledger = dataset(mixed)
    for unit in ledger.parts():
        part = pq.read_table(ledger.part_path(unit))
        data = pa.array([{"total": 12.5, "lines": ["<b>"]}] * part.num_rows)
        sure = pa.array([{"total": 0.876, "lines": [0.5]}] * part.num_rows)
        part = part.append_column("data", data).append_column("confidence", sure)
        pq.write_table(part, ledger.part_path(unit))
    page = html_of(write_report(ledger.output))
    assert '<td class="muted">lines[0]</td><td>&lt;b&gt;</td>' in page
    assert '<td class="muted">total</td><td>12.5</td>' in page
    assert ">0.88</td>" in page


def test_the_job_is_told_in_words_that_a_job_file_takes(mixed):
    page = html_of(write_report(dataset(mixed).output))
    assert "<td>stop_repetition</td><td><code>false</code></td>" in page


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no dataset"):
        write_report(str(tmp_path))


def test_the_record_of_a_run_comes_back_as_it_was_written():
    record = record_of("20261122T222005Z-f8bda8")
    assert RunRecord.from_json(record.to_json(), "x") == record
    bare = dataclasses.replace(record, hardware=None)
    assert RunRecord.from_json(bare.to_json(), "x") == bare


def test_a_tar_with_a_name_twice_shows_each_picture_once(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "twice.tar", "w") as tar:
        for i in range(2):
            info = tarfile.TarInfo("same.png")
            info.size = len(picture(i))
            tar.addfile(info, io.BytesIO(picture(i)))
    page = html_of(write_report(dataset(tmp_path).output))
    assert page.count('src="data:image/jpeg') == 2
    assert _thumbnail(picture(0)) in page
    assert _thumbnail(picture(1)) in page
