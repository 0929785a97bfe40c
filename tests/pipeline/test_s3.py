"""The same job gives the same rows when source and output are in buckets: moto on loopback."""

import io
import logging
import pickle
from urllib.request import Request, urlopen

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moto.server import ThreadedMotoServer

from model import files
from model.files import Folder
from model.weights.checkpoint import load_decoder
from model.weights.convert import Quantizer
from pipeline import lease, storage
from pipeline.documents import write_documents
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.listing import list_flat
from pipeline.model import model_folder, model_revision, open_model
from pipeline.plan import Plan
from pipeline.read import ReadSettings, read_unit
from pipeline.sources import open_source
from pipeline.storage import open_fs
from pipeline.verify import verify
from schemas.errors import ConfigError
from schemas.ledger import Unit, UnitKind
from tests.documents import pdf
from tests.model.conftest import write_tiny
from tests.pipeline.fake_run import job_of, run
from tests.pipeline.test_read import tar_of

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.create_bucket(Bucket="data")
    client.create_bucket(Bucket="out")
    yield client
    urlopen(Request(f"{server}/moto-api/reset", method="POST")).close()


def etags(s3) -> dict[str, str]:
    return {item["Key"]: item["ETag"] for item in s3.list_objects_v2(Bucket="out")["Contents"]}


def parquet_file() -> bytes:
    buffer = io.BytesIO()
    images = [{"bytes": b"p%d" % i, "path": None} for i in range(9)]
    images.append({"bytes": None, "path": "a/0.jpg"})
    pq.write_table(pa.table({"image": images, "id": range(10)}), buffer, row_group_size=3)
    return buffer.getvalue()


FILES = {
    **{f"a/{i}.jpg": b"image %d" % i for i in range(6)},
    "a/empty.jpg": b"",
    "b.tar": tar_of({"1.jpg": b"one", "2.jpg": b"two"}),
    "c.tar": tar_of({"1.jpg": b"1" * 600, "2.jpg": b"2" * 600})[:1500],
    "d.parquet": parquet_file(),
}


def test_the_same_job_gives_the_same_rows_from_a_bucket_and_from_a_disk(s3, server, tmp_path):
    for name, data in FILES.items():
        s3.put_object(Bucket="data", Key=f"set/{name}", Body=data)
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    for marker in ("set/", "set/a/", "set/nothing.jpg/"):
        s3.put_object(Bucket="data", Key=marker, Body=b"")
    run(job_of(tmp_path / "set", tmp_path / "out", keep=("id",)))
    job = job_of("s3://data/set", "s3://out/run", keep=("id",), endpoint_url=server)
    run(job)
    fs, _ = open_fs("s3://out", server)
    parts = list(list_flat(fs, "out/run", "part-"))
    assert len(parts) > 4
    for part in parts:
        here = pq.read_table(tmp_path / "out" / part)
        there = pq.read_table(f"out/run/{part}", filesystem=fs)
        assert there.drop_columns("source").equals(here.drop_columns("source"))
        assert all(s.startswith("s3://data/set/") for s in there["source"].to_pylist())
    found = verify("s3://out/run", server, deep=True)
    assert found.ok
    assert (found.rows, found.reasons) == (21, {"source_damaged": 1})
    before = etags(s3)
    run(job)
    assert etags(s3) == before


def test_what_a_killed_run_left_in_a_bucket_is_finished(s3, server):
    for i in range(10):
        s3.put_object(Bucket="data", Key=f"{i}.jpg", Body=b"%d" % i)
    job = job_of("s3://data", "s3://out", endpoint_url=server)
    ledger = run(job)
    ledger.remove("commits/000000001.json")
    assert not verify("s3://out", server).ok
    run(job)
    assert verify("s3://out", server, deep=True).ok


def test_a_bucket_that_grows_is_done_by_its_etags(s3, server):
    for i in range(6):
        s3.put_object(Bucket="data", Key=f"{i}.jpg", Body=b"%d" % i)
    job = job_of("s3://data", "s3://out", endpoint_url=server, grow=True)
    run(job)
    s3.put_object(Bucket="data", Key="1.jpg", Body=b"1")  # the same once more: the same ETag
    s3.put_object(Bucket="data", Key="2.jpg", Body=b"x")
    s3.put_object(Bucket="data", Key="6.jpg", Body=b"6")  # whole at once: no need to settle
    ledger = run(job)
    growth = ledger.plan.growth
    assert (growth.number, growth.new_files, growth.changed_files) == (1, 1, 1)
    assert [work.rows for work in ledger.record(0).history()] == [4, 1]
    assert verify("s3://out", server, deep=True).ok
    assert run(job).plan.growth.number == 1


def test_more_files_than_one_page_of_a_listing_are_all_found(s3, server, monkeypatch):
    for i in range(20):
        s3.put_object(Bucket="data", Key=f"many/{i:02}.jpg", Body=b"")
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    source = open_source("s3://data/many", server)
    one = next(source.files())
    head = s3.head_object(Bucket="data", Key="many/00.jpg")
    assert (one.size, one.stamp) == (head["ContentLength"], head["ETag"].strip('"'))
    assert [file.name for file in source.files()] == [f"{i:02}.jpg" for i in range(20)]
    glob = open_source("s3://data/many/*7.jpg", server)
    assert [file.name for file in glob.files()] == ["07.jpg", "17.jpg"]


def test_an_object_that_went_away_is_a_row_and_a_reader_can_be_sent_elsewhere(s3, server):
    s3.put_object(Bucket="data", Key="a.jpg", Body=b"a")
    source = open_source("s3://data/", server)
    settings = pickle.loads(pickle.dumps(ReadSettings(source, 1000)))
    unit = Unit(0, UnitKind.IMAGES, ("a.jpg", "gone.jpg"), 0, 2)
    (table,) = read_unit(unit, settings)
    assert table["data"].to_pylist() == [b"a", None]
    assert table["reason"].to_pylist() == [None, "not_found"]
    assert table["source"].to_pylist() == ["s3://data/a.jpg", "s3://data/gone.jpg"]


def test_a_key_does_not_lead_out_of_the_output(s3, server, tmp_path):
    key = "a/../../../../away.pdf"
    s3.put_object(Bucket="data", Key=f"set/{key}", Body=pdf(["x"]))
    job = job_of("s3://data/set", tmp_path / "x/y/out", endpoint_url=server, markdown=True)
    ledger = run(job)
    with Lease(ledger):
        write_documents(job, ledger, open_source(job.source, server))
    (found,) = tmp_path.rglob("*.md")
    assert found.is_relative_to(tmp_path / "x/y/out/_vl01/markdown/a")


def test_one_object_can_be_a_source(s3, server):
    s3.put_object(Bucket="data", Key="x/a.jpg", Body=b"a")
    source = open_source("s3://data/x/a.jpg", server)
    assert [unit.names for unit in Plan(source, 4).units()] == [("a.jpg",)]


@pytest.mark.parametrize("address", ["s3://nobody/x", "s3://data/nowhere", "s3://data/*.jpg"])
def test_a_wrong_bucket_is_one_clear_line(s3, server, address):
    with pytest.raises(ConfigError) as error:
        open_source(address, server)
    assert address in str(error.value)
    assert "\n" not in str(error.value)


def test_an_output_bucket_that_does_not_exist_is_refused_and_not_made(s3, server):
    with pytest.raises(ConfigError, match="cannot write to s3://nobody/run"):
        Ledger("s3://nobody/run", server).prepare()
    assert "nobody" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]


def test_a_server_that_is_not_there_is_a_clear_line(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    with pytest.raises(ConfigError, match="s3://data/x"):
        open_source("s3://data/x", "http://127.0.0.1:9")


def test_a_checkpoint_in_a_bucket_is_the_same_model(s3, server, tmp_path):
    checkpoint = write_tiny(tmp_path / "ckpt")
    for path in checkpoint.iterdir():
        s3.put_object(Bucket="data", Key=f"ckpt/{path.name}", Body=path.read_bytes())
    here = job_of("x", "y").model_copy(update={"model": str(checkpoint)})
    there = here.model_copy(update={"model": "s3://data/ckpt", "endpoint_url": server})
    assert open_model(there) == open_model(here)
    assert model_revision(there) == model_revision(here)
    quantizer = Quantizer(model_folder(there), Folder("s3://out/int8", server))
    quantizer.run(2)
    quantizer.read_back()
    int8 = there.model_copy(update={"model": "s3://out/int8"})
    assert model_revision(int8) == model_revision(here)
    how = {"dtype": torch.bfloat16, "device": "cpu"}
    expected = dict(load_decoder(checkpoint, range(2, 8), **how).named_parameters())
    for job in (there, int8):
        folder = pickle.loads(pickle.dumps(model_folder(job)))  # as a rank gets it
        for name, parameter in load_decoder(folder, range(2, 8), **how).named_parameters():
            assert torch.equal(parameter, expected[name])
    s3.delete_object(Bucket="out", Key="int8/layer-3.safetensors")
    with pytest.raises(ConfigError, match=r"s3://out/int8/layer-3\.safetensors is missing"):
        open_model(int8)


@pytest.mark.parametrize("model", ["s3://nobody/ckpt", "s3://data/nowhere"])
def test_a_model_that_is_not_in_its_bucket_is_one_clear_line(s3, server, model):
    job = job_of("x", "y", endpoint_url=server).model_copy(update={"model": model})
    with pytest.raises(ConfigError, match=rf"{model} has no config\.json\. Expected"):
        open_model(job)


def test_a_server_without_the_model_is_a_clear_line(server, monkeypatch):
    monkeypatch.setattr(files, "READ_FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(files, "READ_TRIES", 2)
    job = job_of("x", "y", endpoint_url="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"s3://data/ckpt/config\.json could not be read in 2"):
        open_model(job.model_copy(update={"model": "s3://data/ckpt"}))
