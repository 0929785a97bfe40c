"""What a plan foretells is what a run does, and what would stop the run stops the plan."""

import io
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from fsspec import AbstractFileSystem

from model.config import load_config
from model.decoder import Decoder
from model.engine.config import EngineConfig
from model.engine.cost import weight_bytes
from model.engine.sequence import blocks_for
from model.inputs.images import DecodeLimits
from model.layers.linear import Quantization
from model.nano.random_checkpoint import (
    RELEASED_SIZES,
    write_configuration,
    write_random_checkpoint,
)
from pipeline import sources
from pipeline.estimate import sample
from pipeline.estimate.estimate import estimate, foretell
from pipeline.estimate.gpus import (
    capacity_estimate,
    engine_config,
    mean_tokens,
    memory_estimate,
    rank_estimates,
)
from pipeline.estimate.headers import HeaderReader
from pipeline.ledger import Ledger
from pipeline.model import model_revision, open_model
from pipeline.placement import place
from pipeline.plan import Plan
from pipeline.prepare import Prepare, PrepareSettings
from pipeline.read import ReadSettings, read_unit
from pipeline.sources import Source, SourceFile, open_source
from pipeline.storage import make_folder
from schemas.errors import ConfigError, Reason
from schemas.estimate import Assumptions, Estimate
from schemas.job import Job
from schemas.ledger import CommitRecord, UnitKind
from schemas.report import Hardware, RunRecord
from tests.documents import encrypted_pdf, pdf, tiff
from tests.http_server import serve
from tests.images import bad_images, encode, good_images, odd_images, page, photograph
from tests.pipeline.test_s3 import s3, server  # noqa: F401
from tests.sources import write_folder, write_parquet, write_source, write_tar

GIB = 1024**3
TOLD_BY_HEADERS = (Reason.EMPTY_FILE, Reason.NOT_AN_IMAGE, Reason.TOO_MANY_PIXELS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), tile=56)


@pytest.fixture
def job(tmp_path, checkpoint) -> Job:
    values: dict[str, Any] = {
        "source": str(tmp_path / "source"),
        "output": str(tmp_path / "out"),
        "model": str(checkpoint),
        "prompt": "Say it.",
        "max_new_tokens": 8,
        "unit_rows": 16,
    }
    return Job(**values)


def plan(job: Job, **assumptions) -> Estimate:
    return estimate(job, Assumptions(**assumptions))


def prepared_rows(job: Job) -> list[dict]:
    """What a run makes of the source before it generates: read and prepared, all of it."""
    model, source = open_model(job), open_source(job.source)
    units = list(Plan(source, job.unit_rows, job.image_column, job.keep).units())
    vision = model.config.vision
    prepare = Prepare(
        PrepareSettings(
            template=model.template,
            pinpoints=model.config.pinpoints,
            tile=vision.image_size,
            patch=vision.patch_size,
            limits=DecodeLimits(job.max_pixels, job.max_bytes, job.decode_seconds),
            exif_rotate=job.exif_rotate,
            kept=pa.schema([]),
        )
    )
    pages = model.page_settings(job)
    settings = ReadSettings(source, job.max_bytes, job.image_column, pages=pages)
    inputs = [table for unit in units for table in read_unit(unit, settings)]
    tables = [prepared.drop_columns(["pixels"]) for table in inputs for prepared in prepare(table)]
    return pa.concat_tables(tables).to_pylist()


def check_against_a_run(told: Estimate, job: Job) -> None:
    rows = prepared_rows(job)
    good = [row for row in rows if row["reason"] is None]
    lengths = sorted(len(row["token_ids"]) for row in good)
    assert told.exact
    assert sum(kind.rows for kind in told.rows.values()) == len(rows)
    assert told.reasons == Counter(row["reason"] for row in rows if row["reason"])
    assert sum(kind.failed for kind in told.rows.values()) == len(rows) - len(good)
    assert told.tiles.total == sum(row["tiles"] for row in good)
    assert told.prompt_tokens.total == sum(lengths)
    assert told.prompt_tokens.median == lengths[(len(lengths) - 1) // 2]
    assert sum(length <= told.prompt_tokens.p95 for length in lengths) >= 0.95 * len(lengths)
    assert sum(length < told.prompt_tokens.p95 for length in lengths) < 0.95 * len(lengths)


@pytest.mark.parametrize("exif_rotate", [False, True])
def test_rows_tiles_and_tokens_of_a_mixed_source_are_those_of_the_run(tmp_path, job, exif_rotate):
    bad = [(name, data) for name, data, reason in bad_images() if reason in TOLD_BY_HEADERS]
    odd = [(name, data) for name, data in odd_images() if "." in name]
    write_source(tmp_path / "source", good_images(60) + odd + bad)
    job = job.model_copy(update={"exif_rotate": exif_rotate})
    told = plan(job)
    assert {kind: rows.rows_known for kind, rows in told.rows.items()} == {
        "images": True,
        "documents": True,
        "tar": True,
        "parquet": True,
    }
    assert told.units == len(list(Plan(open_source(job.source), job.unit_rows).units()))
    check_against_a_run(told, job)


def test_pages_of_documents_are_counted_and_measured_without_rendering(tmp_path, job):
    sizes = {2: (842, 595), 3: (20_000, 300)}
    documents = [
        ("a.pdf", pdf(["x"] * 3, sizes=sizes)),
        ("b.pdf", pdf(["x"] * 40)),
        ("c.pdf", encrypted_pdf()),
        ("d.pdf", pdf(["x"])[:200]),
        ("e.pdf", pdf(["x"] * 41)),
        ("f.tif", tiff([page(0, (300, 200)), page(1, (40, 900))])),
        ("g.tif", tiff([page(0, (300, 200))])),
    ]
    write_folder(tmp_path / "source", documents)
    job = job.model_copy(update={"max_pages": 40})
    told = plan(job)
    assert told.rows["documents"].rows == 3 + 40 + 3 + 2 + 1
    assert told.reasons == {"encrypted": 1, "source_damaged": 1, "too_many_pages": 1}
    check_against_a_run(told, job)


def test_pages_of_documents_inside_of_files_are_counted_and_measured(tmp_path, job, monkeypatch):
    """In a plan nothing is rendered: what comes of it is compared with a run's rows."""
    documents = [
        ("a.pdf", pdf(["x"] * 3, sizes={2: (842, 595)})),
        ("b.png", good_images(1)[0][1]),
        ("c.pdf", encrypted_pdf()),
        ("d.tif", tiff([page(0, (300, 200)), page(1, (40, 900))])),
        ("e.tif", tiff([page(0, (300, 200))])),
        ("f.pdf", pdf(["x"] * 6)),
        ("g.pdf", pdf(["x"])[:200]),
    ]
    folder = tmp_path / "source"
    folder.mkdir()
    write_tar(folder / "x.tar", documents)
    with tarfile.open(folder / "x.tar", "a") as tar:
        link = tarfile.TarInfo("./link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "b.png"
        tar.addfile(link)
    write_parquet(folder / "y.parquet", documents, group_rows=2)
    job = job.model_copy(update={"max_pages": 5, "unit_rows": 2})
    told = plan(job)
    assert told.rows["tar"].rows == 3 + 1 + 1 + 2 + 1 + 1 + 1 + 1
    assert told.rows["parquet"].rows == 3 + 1 + 1 + 2 + 1 + 1 + 1
    check_against_a_run(told, job)
    assert [kind.pages for kind in told.rows.values()] == [True, True]
    write_parquet(folder / "y.parquet", [documents[0], documents[1]] * 40, group_rows=2)
    monkeypatch.setattr(sample, "HEADERS", 16)
    monkeypatch.setattr(sample, "_PLACES", dict.fromkeys(UnitKind, 4))
    told = plan(job)
    assert (told.rows["parquet"].rows, told.rows["parquet"].rows_known) == (160, False)


def test_many_pages_are_told_from_a_sample_of_each_document(tmp_path, job, monkeypatch):
    monkeypatch.setattr(sample, "HEADERS", 40)
    documents = [(f"{i}.pdf", pdf(["x"] * 30 * (i + 1))) for i in range(4)]
    write_folder(tmp_path / "source", documents)
    told = plan(job)
    assert told.rows["documents"].rows == 300
    assert 36 <= told.rows["documents"].headers <= 40
    assert not told.exact
    assert told.tiles.total == 300 * told.tiles.median


def test_addresses_are_all_counted_and_few_of_them_fetched(tmp_path, job, monkeypatch):
    images = good_images(6)
    with serve({f"/{i}.jpg": data for i, (_, data) in enumerate(images)}) as site:
        lines = [site.url(f"/{i % 7}.jpg") for i in range(70)]  # every seventh is not there
        (tmp_path / "list.txt").write_text("\n".join(lines))
        source, hosts = str(tmp_path / "list.txt"), ("127.0.0.1",)
        changes = {"source": source, "allow_host": hosts, "host_rate": 1e4}
        job = job.model_copy(update=changes)
        told = plan(job)
        assert told.exact
        assert told.rows["list"].rows == 70
        assert told.reasons == {"not_found": 10}
        monkeypatch.setattr(sample, "_PLACES", dict.fromkeys(UnitKind, 14))
        site.asked.clear()
        told = plan(job)
    assert not told.exact
    assert (told.rows["list"].rows, told.rows["list"].rows_known) == (70, True)
    assert told.rows["list"].headers == len(site.asked) == 14


def test_pages_of_documents_behind_addresses_are_counted_without_rendering(tmp_path, job):
    files = {"/1": pdf(["x"] * 5), "/2": good_images(1)[0][1], "/3": pdf(["x"])[:200]}
    with serve(files) as site:
        (tmp_path / "list.txt").write_text("\n".join(site.url(path) for path in files))
        changes = {"source": str(tmp_path / "list.txt"), "allow_host": ("127.0.0.1",)}
        told = plan(job.model_copy(update=changes))
    assert told.exact
    assert told.rows["list"].rows == 5 + 1 + 1
    assert told.reasons == {"source_damaged": 1}


def test_damaged_sources_are_foretold_with_their_reasons(tmp_path, job):
    folder = tmp_path / "source"
    images = good_images(12)
    write_folder(folder, images[:3])
    write_tar(folder / "whole.tar", images)
    write_tar(folder / "empty.tar", [])
    data = (folder / "whole.tar").read_bytes()
    (folder / "cut.tar").write_bytes(data[: len(data) // 2])
    (folder / "cut-in-a-header.tar").write_bytes(data[: 512 * 3 + 100])
    (folder / "none.tar").touch()
    write_parquet(folder / "rows.parquet", [*images[:9], ("nothing.jpg", b"")])
    (folder / "cut.parquet").write_bytes((folder / "rows.parquet").read_bytes()[:-100])
    (folder / "gone.jpg").symlink_to("nowhere")
    check_against_a_run(plan(job), job)


def test_limits_of_bytes_and_pixels_are_foretold(tmp_path, job):
    write_source(tmp_path / "source", good_images(30))
    small = job.model_copy(update={"max_bytes": 40_000, "max_pixels": 200_000})
    told = plan(small)
    assert set(told.reasons) == {Reason.TOO_MANY_BYTES, Reason.TOO_MANY_PIXELS}
    check_against_a_run(told, small)


def test_a_sample_says_so_and_is_near_and_the_same_each_time(tmp_path, job, monkeypatch):
    images = good_images(160)
    write_folder(tmp_path / "source" / "loose", images)
    for i in range(8):
        write_tar(tmp_path / "source" / f"{i}.tar", images[i * 20 : (i + 1) * 20])
        write_parquet(tmp_path / "source" / f"{i}.parquet", images[i * 20 : (i + 1) * 20])
    whole = plan(job)
    monkeypatch.setattr(sample, "HEADERS", 48)
    most = dict.fromkeys(UnitKind, 48) | {UnitKind.TAR: 6, UnitKind.PARQUET: 12}
    monkeypatch.setattr(sample, "_PLACES", most)
    told = plan(job)
    assert whole.exact
    assert not told.exact
    assert told == plan(job)
    assert told.rows["images"].headers == 48
    assert told.rows["images"].rows + told.rows["documents"].rows == 160
    assert told.rows["parquet"].rows == 160
    assert not told.rows["tar"].rows_known
    assert told.rows["tar"].rows == pytest.approx(160, rel=0.3)
    assert told.prompt_tokens.total == pytest.approx(whole.prompt_tokens.total, rel=0.15)
    assert told.tiles.total == pytest.approx(whole.tiles.total, rel=0.15)


def test_a_run_does_not_wait_long_for_a_look_at_a_slow_source(tmp_path, job, monkeypatch):
    """GPUs may be paid for by then."""
    write_folder(tmp_path / "source", good_images(160))
    whole, look_into = plan(job), HeaderReader.look_into

    def slowly(*arguments) -> list:
        time.sleep(0.2)
        return look_into(*arguments)

    monkeypatch.setattr(HeaderReader, "look_into", slowly)
    monkeypatch.setitem(sample._THREADS, UnitKind.IMAGES, 4)  # 8 s for all of them
    model, source = open_model(job), open_source(job.source)
    units = list(Plan(source, job.unit_rows).units())
    began = time.monotonic()
    told = foretell(job, model, source, units, None, Assumptions(), look_seconds=2.5)
    assert time.monotonic() - began < 5
    assert not told.exact
    assert 4 <= told.rows["images"].headers < 80
    assert told.rows["images"].rows == whole.rows["images"].rows
    assert told.tiles.total == pytest.approx(whole.tiles.total, rel=0.3)
    at_once = foretell(job, model, source, units, None, Assumptions(), look_seconds=0)
    assert at_once.rows["images"].headers == 1
    assert at_once.rows["images"].rows == whole.rows["images"].rows


class OneImageEverywhere(AbstractFileSystem):
    """A disk with any file one asks for."""

    protocol = "everywhere"
    data = encode(photograph("china", (64, 48)), "JPEG")

    def _open(self, path, mode="rb", **options):
        file = io.BytesIO(self.data)
        file.size = len(self.data)  # type: ignore[attr-defined]
        return file


def test_a_million_files_are_not_held_in_memory_nor_opened(job, monkeypatch):
    count = 200_000
    names = (f"folder-{i // 1000:04}/image-{i:07}.jpg" for i in range(count))
    listing = (SourceFile(name, 1, "0") for name in names)
    monkeypatch.setattr(sources, "list_files", lambda *_: listing)
    source = Source("everywhere://many", OneImageEverywhere(), "/many")
    monkeypatch.setattr("pipeline.estimate.estimate.open_source", lambda *_: source)
    started = time.monotonic()
    tracemalloc.start()
    told = plan(job)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert told.rows["images"].rows == count
    assert told.rows["images"].headers == sample.HEADERS
    assert told.tiles.median * count == told.tiles.total
    assert peak < 30e6
    assert time.monotonic() - started < 60


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_a_plan_leaves_nothing_behind(tmp_path, job):
    write_source(tmp_path / "source", good_images(6))
    before = set(tree(tmp_path))
    plan(job)
    plan(job.model_copy(update={"output": str(tmp_path / "new" / "deep" / "out")}))
    assert set(tree(tmp_path)) == before


def test_a_plan_changes_nothing_of_the_dataset_it_is_for(tmp_path, job):
    write_source(tmp_path / "source", good_images(6))
    begin(job)
    before = tree(tmp_path / "out" / "_vl01")
    plan(job)
    assert tree(tmp_path / "out" / "_vl01") == before


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"source": "{tmp}/nowhere"}, "does not exist"),
        ({"source": "{tmp}/empty"}, "nothing to read"),
        ({"source": "nothing://x"}, "cannot open"),
        ({"output": "{tmp}/source/a.jpg"}, "not a folder"),
        ({"output": "{tmp}/source/a.jpg/out"}, "cannot write"),
        ({"output": "/proc/out"}, "cannot write"),
        ({"output": "{tmp}/source"}, "not of this tool"),
        ({"model": "{tmp}/source"}, "config.json"),
        ({"prompt": "What is <image>?"}, "special token"),
        ({"system": "<end_of_sentence>"}, "special token"),
        ({"pp": 9}, "8 layers"),
        ({"keep": ("url", "nobody")}, "nobody"),
        ({"image_column": "scan"}, "scan"),
        ({"chunk_tokens": 64}, "chunk_tokens"),
        ({"cache_gib": 1e-5}, "too small"),
    ],
)
def test_what_would_stop_the_run_stops_the_plan_and_leaves_nothing(tmp_path, job, wrong, says):
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(good_images(1)[0][1])
    write_parquet(folder / "table.parquet", good_images(3))
    if wrong.get("image_column"):
        wrong = {**wrong, "source": str(folder / "table.parquet")}
    filled = {
        key: value.format(tmp=tmp_path) if isinstance(value, str) else value
        for key, value in wrong.items()
    }
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=says):
        plan(job.model_copy(update=filled))
    assert set(tree(tmp_path)) == set(before)


def test_a_damaged_checkpoint_stops_the_plan(tmp_path, job, checkpoint):
    write_folder(tmp_path / "source", good_images(1))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "model-00001-of-00003.safetensors" and path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError):
        plan(job.model_copy(update={"model": str(broken)}))


def begin(job: Job) -> Ledger:
    """The ledger of a run of this job that has just begun."""
    ledger = Ledger(job.output)
    ledger.prepare()
    units = Plan(open_source(job.source), job.unit_rows, job.image_column, job.keep)
    ledger.create(job, job.fingerprint(model_revision(job)), units, "run")
    return ledger


def test_the_output_of_another_job_stops_the_plan(tmp_path, job):
    write_folder(tmp_path / "source", good_images(2))
    begin(job)
    with pytest.raises(ConfigError, match="another job: prompt"):
        plan(job.model_copy(update={"prompt": "Say something else."}))


def test_files_that_are_not_read_are_told_before_a_run(tmp_path, job):
    write_folder(tmp_path / "source", good_images(2))
    (tmp_path / "source/a.heic").write_bytes(b"x")
    assert plan(job).unread == {".heic": 1}


def test_only_what_is_left_is_planned(tmp_path, job):
    images = [(f"{name}.jpg", data) for name, data in good_images(40)]
    write_folder(tmp_path / "source", images)
    ledger = begin(job)
    first = plan(job)
    assert (first.units, first.units_done, first.rows["images"].rows) == (3, 0, 40)
    (tmp_path / "out/_vl01/commits/000000001.json").write_text("{}")
    rest = plan(job)
    assert (rest.units, rest.units_done, rest.rows["images"].rows) == (2, 1, 24)
    for unit in (0, 2):
        ledger.write(f"commits/{unit:09}.json", b"{}")
    done = plan(job)
    assert (done.units, done.units_done, done.rows) == (0, 3, {})
    assert done.prompt_tokens.total == 0


def test_what_a_source_has_grown_by_is_planned_and_nothing_is_written(tmp_path, job):
    images = [image for image in good_images(60) if not image[0].endswith("tif")]
    write_folder(tmp_path / "source", images[:40])
    ledger = begin(job)
    for unit in range(3):
        record = CommitRecord(unit, ledger.part_name(unit), 16, 1, "sha", {"ok": 16})
        ledger.write(f"commits/{unit:09}.json", record.to_json())
    job = job.model_copy(update={"grow": True, "settle_seconds": 0.0})
    nothing = plan(job)
    assert (nothing.units, nothing.rows) == (0, {})
    write_folder(tmp_path / "source" / "new", images[40:46])
    (tmp_path / "source" / images[3][0]).write_bytes(images[4][1] + b"x")
    before = tree(tmp_path)
    told = plan(job)
    assert tree(tmp_path) == before
    assert told.growth is not None
    assert (told.growth.new_files, told.growth.changed_files) == (6, 1)
    assert sum(kind.rows for kind in told.rows.values()) == 7
    assert (told.units, told.units_done) == (2, 2)  # one of the three is to be done again


def test_a_cluster_that_is_too_small_stops_the_plan(tmp_path, job, monkeypatch):
    write_folder(tmp_path / "source", good_images(1))
    asked = []

    @contextmanager
    def session(address):
        asked.append(address)
        yield

    monkeypatch.setattr("pipeline.placement.ray_session", session)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4, "GPU": 2})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"GPU": 2}}])
    with pytest.raises(ConfigError, match="takes GPUs: 4; the cluster has: 2"):
        plan(job.model_copy(update={"address": "10.0.0.1:6379", "replicas": 4}))
    assert asked == ["10.0.0.1:6379"]
    plan(job.model_copy(update={"replicas": 4}))  # where it will run is not known
    assert len(asked) == 1


def test_the_weights_of_each_rank_are_counted_as_they_are_loaded(job):
    model = load_config(job.model)
    how: list[tuple[torch.dtype, Quantization]] = [
        (torch.bfloat16, "int8"),
        (torch.bfloat16, "int8-dynamic"),
        (torch.float32, "none"),
    ]
    for dtype, quantization in how:
        for span in (range(8), range(3), range(5, 8)):
            decoder = Decoder(model, span, dtype=dtype, device="meta", quantization=quantization)
            loaded = sum(p.numel() * p.element_size() for p in decoder.parameters())
            int8 = quantization != "none"
            assert weight_bytes(model, span, int8=int8, itemsize=dtype.itemsize) == loaded


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    write_configuration(folder, RELEASED_SIZES)
    return folder


def test_the_released_model_fits_the_gpus_it_is_known_to_fit(job, released):
    model = load_config(released)

    def memory(pp: int, gib: float):
        engine = engine_config(job.model_copy(update={"pp": pp}))
        return memory_estimate(model, replace(engine, tokens_per_sequence=2500), int(gib * GIB))

    on_eight = memory(8, 80)
    assert on_eight.weights / GIB == pytest.approx(53 + 2.3, abs=1)
    # Numbers of states, their scales, tokens beside them.
    assert on_eight.sequence == 9 * (2 * 1024**2 + 64 * 1024 + 256 * 1024)
    assert on_eight.token == 2 * 4 * 1024
    assert on_eight.sequences == 384
    on_four = memory(4, 139)
    assert on_four.weights / GIB == pytest.approx(106 + 2.3, abs=2)
    assert 330 <= on_four.sequences <= 384
    with pytest.raises(ConfigError, match=r"--pp 4 a rank has 10\d\.\d GiB.*--pp 6 would do"):
        memory(4, 80)
    with pytest.raises(ConfigError, match="larger GPUs"):
        memory(4, 4)


@pytest.mark.parametrize("pp", [4, 6, 8])
def test_the_ranks_that_are_shown_hold_what_the_memory_was_reckoned_from(job, released, pp):
    model, engine = load_config(released), engine_config(job.model_copy(update={"pp": pp}))
    ranks = rank_estimates(model, engine)
    assert [rank.first_layer for rank in ranks[1:]] == [rank.last_layer + 1 for rank in ranks[:-1]]
    told = memory_estimate(model, engine, 141 * GIB)
    assert max(rank.weights for rank in ranks) == told.weights
    assert sum(rank.weights for rank in ranks) / GIB == pytest.approx(423 + 2 * 2.3, abs=2)
    assert max(rank.busy or 0 for rank in ranks) == 1


def test_memory_is_shared_out_for_rows_as_long_as_those_of_the_job(job, released):
    model, pages = load_config(released), job.model_copy(update={"pp": 4, "max_new_tokens": 2048})
    tokens = mean_tokens(8022, pages)
    assert tokens == 8022 + 1024
    assert mean_tokens(0, pages) == EngineConfig.tokens_per_sequence
    engine = engine_config(pages)
    blind = capacity_estimate(model, engine, 139 * GIB)
    knowing = memory_estimate(model, replace(engine, tokens_per_sequence=tokens), 139 * GIB)
    assert knowing.sequences > 1.3 * (blind.blocks // blocks_for(tokens))


def test_no_gpu_is_counted_for_a_run_on_cpu(tmp_path, job):
    write_folder(tmp_path / "source", good_images(2))
    told = plan(job.model_copy(update={"device": "cpu"}), tokens_per_second=100.0)
    assert told.memory is None
    assert told.time is not None
    assert told.time.gpu_hours is None


def test_without_a_known_throughput_no_time_is_made_up(tmp_path, job):
    write_folder(tmp_path / "source", good_images(2))
    told = plan(job)
    assert told.throughput is None
    assert told.time is None


def test_time_and_price_follow_from_the_throughput_that_is_given(tmp_path, job):
    write_folder(tmp_path / "source", good_images(5))
    job = job.model_copy(update={"pp": 2, "replicas": 3})
    told = plan(job, tokens_per_second=10.0, gpu_hour_price=2.5)
    tokens = told.prompt_tokens.total + 5 * job.max_new_tokens
    assert told.throughput is not None
    assert told.time is not None
    assert told.time.seconds == pytest.approx(tokens / 10)
    assert told.time.gpu_hours == pytest.approx(tokens / 10 / 3600 * 6)
    assert told.time.price == pytest.approx(tokens / 10 / 3600 * 6 * 2.5)
    assert "--tokens-per-second" in told.throughput.origin


def record_run(ledger: Ledger, run: str, ranks: int, seconds: float) -> None:
    record = RunRecord(
        run=run,
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:01:00+00:00",
        seconds=seconds,
        rows={"ok": 8, "truncated": 2, "failed": 90},
        prompt_tokens=2950,
        output_tokens=50,
        stage_seconds={},
        hardware=Hardware("cuda", ranks, 1, 1),
    )
    make_folder(ledger.fs, f"{ledger.root}/_vl01/runs")
    ledger.write(f"runs/{run}.json", record.to_json())


def test_the_last_run_with_as_many_gpus_tells_the_speed(tmp_path, job):
    write_folder(tmp_path / "source", good_images(10))
    ledger = begin(job)
    record_run(ledger, "20260101T000000Z-a", ranks=1, seconds=300.0)
    record_run(ledger, "20260102T000000Z-b", ranks=1, seconds=100.0)
    record_run(ledger, "20260103T000000Z-c", ranks=2, seconds=1.0)
    ledger.write("runs/20260104T000000Z-d.json", b"{}")
    told = plan(job)
    assert told.throughput is not None
    assert told.throughput.tokens_per_second == 30
    assert told.throughput.output_tokens == 5
    assert "20260102T000000Z-b" in told.throughput.origin
    assert told.time is not None
    assert told.time.seconds == pytest.approx((told.prompt_tokens.total + 10 * 5) / 30)
    given = plan(job, tokens_per_second=60.0)
    assert given.time is not None
    assert given.time.seconds == pytest.approx(told.time.seconds / 2)
    assert plan(job.model_copy(update={"replicas": 2})).throughput is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_takes_the_defaults_that_a_run_takes(job, monkeypatch, device):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4, "GPU": 1})
    nodes = [{"Alive": True, "Resources": {"GPU": 1}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    job = job.model_copy(update={"device": device})
    assert engine_config(job).chunk_tokens == place(job).chunk_tokens


def test_ray_is_not_needed():
    check = (
        "import sys, pipeline.estimate.estimate, pipeline.status\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_plan_for_buckets_reads_headers_and_leaves_nothing(s3, server, job):  # noqa: F811
    for name, data in good_images(5):
        s3.put_object(Bucket="data", Key=f"in/{name}", Body=data)
    on_s3 = job.model_copy(
        update={"source": "s3://data/in", "output": "s3://out/new", "endpoint_url": server}
    )
    told = plan(on_s3)
    assert told.exact
    assert told.rows["images"].rows == 5
    assert "Contents" not in s3.list_objects_v2(Bucket="out")
    with pytest.raises(ConfigError, match="cannot write"):
        plan(on_s3.model_copy(update={"output": "s3://no-such-bucket/out"}))
